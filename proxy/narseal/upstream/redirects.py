"""How far an upstream may send us: rules of redirects and credentials, for both kinds of requests."""

from __future__ import annotations

from yarl import URL

from narseal.config import UpstreamConfig
from narseal.errors import UpstreamTrouble
from narseal.upstream.credentials import credentials

HOPS = 5
REDIRECTS = (301, 302, 303, 307, 308)
ABSENT = (403, 404, 410)  # S3 answers 403 for what is not there, and Nix takes it as absence


class Reach:
    """Which origins are the upstream's own, and who gets its credentials."""

    def __init__(self, config: UpstreamConfig) -> None:
        self._origin = URL(config.url).origin()
        self._trusted = {
            self._origin,
            *(URL(origin).origin() for origin in config.redirect_origins),
        }
        self._credentials = credentials(config, self._origin.host or "")

    def is_trusted(self, url: URL) -> bool:
        """Whether it may be at a private address; any other origin must be public."""
        return url.origin() in self._trusted

    def credentials(self, url: URL) -> dict[str, str]:
        """Headers for the upstream's own origin, none for any other."""
        return self._credentials if url.origin() == self._origin else {}


def next_hop(url: URL, location: str) -> URL:
    """Where a redirect leads; UpstreamTrouble if it must not be followed."""
    try:
        target = url.join(URL(location, encoded=True)) if location else URL()
        (target.host or "").encode("idna")
        str(target).encode("ascii")
    except ValueError as error:  # UnicodeError is one, too
        raise UpstreamTrouble(f"{url}: redirects to {location[:200]!a}: {error}") from error
    if target.scheme not in ("http", "https") or not target.host:
        raise UpstreamTrouble(f"{url}: redirects to {location[:200]!a}")
    if url.scheme == "https" and target.scheme == "http":
        raise UpstreamTrouble(f"{url}: redirects from https to http")
    return target

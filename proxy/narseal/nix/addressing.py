"""What a narinfo says of itself: whether its CA makes its store path, whether its URL stays at home."""

from __future__ import annotations

import re
from urllib.parse import unquote

from narseal.errors import Refused
from narseal.nix.content_address import Method
from narseal.nix.narinfo import NarInfo

_ENCODED = re.compile(r"%(2e|2f|5c|25|[01][0-9a-f]|7f)", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def check_url(url: str) -> None:
    """Refused if a narinfo's URL could leave the upstream's own address or folder."""
    if _SCHEME.match(url) or url.startswith(("/", "\\")):
        raise Refused("absolute-url", f"the narinfo's URL is not relative: {url[:200]!r}")
    plain = unquote(url.partition("?")[0])
    if (
        _ENCODED.search(url)
        or "\\" in plain
        or "#" in url
        or any(part in ("", ".", "..") for part in plain.split("/"))
        or not plain.isascii()
    ):
        raise Refused("escapes-upstream", f"the narinfo's URL leaves its upstream: {url[:200]!r}")


def check_content_address(info: NarInfo) -> None:
    """Refused("ca-mismatch") if the CA does not recompute to the store path, or denies NarHash.

    It speaks for the path and its references, never for NarSize: who signs on a CA measures the
    NAR, too.
    """
    if info.ca is None:
        return
    path = info.store_path
    computed = info.ca.store_path(
        path.name, info.references, self_hash=path.hash_part, store_dir=info.store_dir
    )
    if computed != path:
        raise Refused("ca-mismatch", f"{path}: its CA recomputes to {computed or 'no path at all'}")
    if names_nar_hash(info) and info.ca.hash != info.nar_hash:
        raise Refused("ca-mismatch", f"{path}: its CA and its NarHash contradict each other")


def names_nar_hash(info: NarInfo) -> bool:
    """Whether the CA is over the very NAR, so that its hash must be NarHash."""
    if info.ca is None or info.ca.method is not Method.NAR or info.ca.hash.algorithm != "sha256":
        return False
    return not info.refers_to_itself

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


def check_content_address(info: NarInfo) -> bool:
    """Whether the CA speaks for NarHash too, not only for the path's name."""
    if info.ca is None:
        return False
    path = info.store_path
    computed = info.ca.store_path(
        path.name, info.references, self_hash=path.hash_part, store_dir=info.store_dir
    )
    if computed != path:
        raise Refused("ca-mismatch", f"{path}: its CA recomputes to {computed or 'no path at all'}")
    refers_to_itself = any(ref.hash_part == path.hash_part for ref in info.references)
    if info.ca.method is not Method.NAR or info.ca.hash.algorithm != "sha256" or refers_to_itself:
        return False
    if info.ca.hash != info.nar_hash:
        raise Refused("ca-mismatch", f"{path}: its CA and its NarHash contradict each other")
    return True

"""What a signature of ours may rest on. Pure: a narinfo and an upstream's rules in, evidence out.

This is the sign rule (docs/security.md, I1): a fingerprint is signed only with a signature over
the very same fingerprint by a key pinned to that upstream, or a content address that recomputes
to the path, or the bytes themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from narseal.config import UpstreamConfig
from narseal.errors import Refused
from narseal.nix.addressing import check_content_address, check_url
from narseal.nix.compression import decompressor
from narseal.nix.content_address import Method
from narseal.nix.keys import PublicKey, Signature
from narseal.nix.narinfo import MOST_BUT_OURS, NarInfo

_MAX_VERIFICATIONS = 4


@dataclass(frozen=True, slots=True)
class Evidence:
    """What speaks for a narinfo's fingerprint."""

    #: `signature NAME`, `content-address`, `content` or `bundle`; kept in the index.
    text: str
    #: The bytes have to be fetched and hashed before anything is signed.
    content_first: bool


def weigh(
    info: NarInfo,
    *,
    asked: str,
    upstream: UpstreamConfig,
    own_keys: Mapping[str, PublicKey],
    max_nar_size: int,
    revoked: frozenset[str] = frozenset(),
) -> tuple[NarInfo, Evidence]:
    """The narinfo with only the signatures that are worth keeping, and the evidence for it.

    Kept are verified signatures and those by keys that nobody here knows; dropped are those that
    claim a known name, ours or the upstream's, and do not verify, and those by revoked keys. Refused if the narinfo is of
    another path, leaves its upstream, is too large, cannot be decoded, or has no evidence.
    """
    path = info.store_path
    if path.hash_part != asked:
        raise Refused("wrong-path", f"asked for {asked}, the narinfo is of {path}")
    check_url(info.url)
    if info.nar_size > max_nar_size:
        raise Refused(
            "too-large", f"{path}: {info.nar_size} bytes; limits.nar_size is {max_nar_size}"
        )
    decompressor(info.compression)
    by_address = check_content_address(info)
    message = info.fingerprint()
    info = info.with_signatures(tuple(s for s in info.signatures if s.key_name not in revoked))
    pinned = {key.name: key for key in upstream.public_keys}
    good = _verified(info.signatures, pinned, message)
    ours = _verified(info.signatures, own_keys, message)
    foreign = [
        s for s in info.signatures if s.key_name not in pinned and s.key_name not in own_keys
    ]
    known = {*good, *ours}
    kept = info.with_signatures(
        tuple(sorted({*known, *foreign[: max(0, MOST_BUT_OURS - len(known))]}))
    )
    content_first = upstream.sign_when == "content" or upstream.verify != "signature"
    if good:
        return kept, Evidence(f"signature {good[0].key_name}", content_first)
    if info.ca is not None and info.ca.method is not Method.GIT:  # git's hash is not recomputed
        return kept, Evidence("content-address", content_first or not by_address)
    if upstream.verify != "signature" and not pinned:
        return kept, Evidence(upstream.verify, content_first=True)
    raise Refused("unsigned", f"{path}: {_why_unsigned(info, pinned)}")


def _verified(
    signatures: Iterable[Signature], keys: Mapping[str, PublicKey], message: bytes
) -> list[Signature]:
    candidates = [s for s in signatures if s.key_name in keys][:_MAX_VERIFICATIONS]
    return [s for s in candidates if keys[s.key_name].verifies(message, s)]


def _why_unsigned(info: NarInfo, pinned: Mapping[str, PublicKey]) -> str:
    names = sorted({s.key_name for s in info.signatures})
    if any(name in pinned for name in names):
        return "its signature is not over what the narinfo says"
    if names:
        return f"signed by {', '.join(names[:4])}, none of which is pinned to this upstream"
    return "not signed"

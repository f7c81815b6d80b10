"""What a signature of ours may rest on. Pure: a narinfo and an upstream's rules in, evidence out.

This is the sign rule (docs/security.md, I1): a fingerprint is signed only if one trusted signature
covers all of it, or if every part of it was measured on the bytes: the path from its content
address, NarHash and NarSize from the NAR, the references by a scan of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from narseal.config import UpstreamConfig
from narseal.errors import Refused
from narseal.nix.addressing import check_content_address, check_url
from narseal.nix.compression import decompressor
from narseal.nix.keyring import KeyRing
from narseal.nix.keys import PublicKey
from narseal.nix.narinfo import MOST_BUT_OURS, NarInfo

CONTENT_ADDRESS = "content-address"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What speaks for a narinfo's fingerprint."""

    #: `signature NAME`, `content-address`, `content` or `bundle`; kept in the index.
    text: str
    #: The bytes have to be fetched and hashed before anything is signed.
    content_first: bool
    #: No signature vouches for the references: they must be found in the NAR.
    scan: bool = False


def weigh(
    info: NarInfo,
    *,
    upstream: UpstreamConfig,
    own_keys: KeyRing,
    max_nar_size: int,
    revoked: frozenset[str] = frozenset(),
) -> tuple[NarInfo, Evidence]:
    """The narinfo with only the signatures that are worth keeping, and the evidence for it.

    Kept are verified signatures and those by keys that nobody here knows; dropped are those that
    claim a known name, ours or the upstream's, and do not verify, and those by revoked keys.
    Refused if the narinfo leaves its upstream, is too large, cannot be decoded, or has no evidence.
    """
    path = info.store_path
    check_url(info.url)
    if info.nar_size > max_nar_size:
        raise Refused(
            "too-large", f"{path}: {info.nar_size} bytes; limits.nar_size is {max_nar_size}"
        )
    decompressor(info.compression)
    check_content_address(info)
    message = info.fingerprint()
    info = info.with_signatures(tuple(s for s in info.signatures if s.key_name not in revoked))
    pinned, known = _rings(upstream.public_keys, own_keys)
    good = pinned.without(revoked).verified(message, info.signatures)
    kept = info.with_signatures(known.kept(message, info.signatures, most=MOST_BUT_OURS, good=good))
    if good:
        content_first = upstream.sign_when == "content" or upstream.verify != "signature"
        return kept, Evidence(f"signature {good[0].key_name}", content_first)
    if info.ca is not None and info.ca.is_evidence:
        return kept, Evidence(CONTENT_ADDRESS, content_first=True)
    if upstream.verify != "signature" and not pinned:
        scan = upstream.verify == "content"  # a bundle names the references
        return kept, Evidence(upstream.verify, content_first=True, scan=scan)
    raise Refused("unsigned", f"{path}: {_why_unsigned(info, pinned)}")


@lru_cache
def _rings(public_keys: tuple[PublicKey, ...], own: KeyRing) -> tuple[KeyRing, KeyRing]:
    """An upstream's keys, and those with ours: few, and the same for each of its narinfos."""
    return KeyRing.of(public_keys), KeyRing.of(public_keys, own.keys)


def _why_unsigned(info: NarInfo, pinned: KeyRing) -> str:
    names = sorted({s.key_name for s in info.signatures})
    if any(name in pinned for name in names):
        return "its signature is not over what the narinfo says"
    if names:
        return f"signed by {', '.join(names[:4])}, none of which is pinned to this upstream"
    return "not signed"

"""Hashes in every spelling that Nix reads: `sha256:` with nix32, hex or base64, and SRI."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

from narseal.errors import MalformedHash
from narseal.nix import base32

#: Digest sizes in bytes of the algorithms that Nix knows.
SIZES = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}

_HEX = re.compile(r"[0-9a-fA-F]*", re.ASCII)
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}", re.ASCII)


def decode_base64(text: str) -> bytes:
    """Base-64 with or without padding, but with no other freedom; raises ValueError."""
    if not _BASE64.fullmatch(text):
        raise ValueError("not base-64")
    bare = text.rstrip("=")
    try:
        data = base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError("not base-64") from error
    canonical = base64.b64encode(data).decode()
    if text not in (canonical, canonical.rstrip("=")):
        raise ValueError("base-64 with stray bits")
    return data


@dataclass(frozen=True, slots=True)
class Hash:
    """One digest and the name of its algorithm."""

    algorithm: str
    digest: bytes

    def __post_init__(self) -> None:
        if SIZES.get(self.algorithm) != len(self.digest):
            raise MalformedHash(f"{len(self.digest)} bytes are no {self.algorithm} digest")

    @classmethod
    def sha256(cls, data: bytes) -> Hash:
        """The SHA-256 of bytes."""
        return cls("sha256", hashlib.sha256(data).digest())

    @classmethod
    def parse(cls, text: str) -> Hash:
        """`algo:nix32|hex|base64` or SRI `algo-base64`; MalformedHash on anything else."""
        for separator in ":-":
            algorithm, found, rest = text.partition(separator)
            if found and algorithm in SIZES:
                return cls(algorithm, _decode(rest, SIZES[algorithm], sri=separator == "-"))
        raise MalformedHash(f"no known algorithm before the digest: {text[:80]!r}")

    @property
    def nix32(self) -> str:
        """The digest alone, in nix32."""
        return base32.encode(self.digest)

    @property
    def hex(self) -> str:
        """The digest alone, in lower-case hex."""
        return self.digest.hex()

    @property
    def sri(self) -> str:
        """`algo-base64`, as W3C Subresource Integrity writes it."""
        return f"{self.algorithm}-{base64.b64encode(self.digest).decode()}"

    def __str__(self) -> str:
        """`algo:nix32`, as Nix writes it into narinfo and fingerprint."""
        return f"{self.algorithm}:{self.nix32}"


def _decode(text: str, size: int, *, sri: bool) -> bytes:
    if not sri and len(text) == 2 * size:
        if not _HEX.fullmatch(text):
            raise MalformedHash(f"not hex: {text[:130]!r}")
        return bytes.fromhex(text)
    if not sri and len(text) == base32.encoded_length(size):
        return base32.decode(text, size)
    try:
        data = decode_base64(text)
    except ValueError as error:
        raise MalformedHash(f"{error}: {text[:130]!r}") from error
    if len(data) != size:
        raise MalformedHash(f"{len(data)} bytes where {size} are due: {text[:130]!r}")
    return data

"""Substituter keys and signatures, as `nix key generate-secret` and `Sig:` write them."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field

from nacl.bindings import (
    crypto_sign_BYTES,
    crypto_sign_PUBLICKEYBYTES,
    crypto_sign_SECRETKEYBYTES,
)
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from narseal.errors import MalformedKey
from narseal.nix.hashes import decode_base64

_NAME = re.compile(r"[!-9;-~]{1,255}", re.ASCII)  # printable ASCII: no space, no colon


def check_key_name(name: str) -> str:
    """A key's name: printable ASCII without space or colon; MalformedKey else."""
    if not _NAME.fullmatch(name):
        raise MalformedKey(f"not a key name (printable ASCII, no space, no colon): {name[:80]!r}")
    return name


def _split(text: str, size: int, what: str) -> tuple[str, bytes]:
    name, colon, rest = text.partition(":")
    if not colon:
        raise MalformedKey(f"{what} without a colon")
    check_key_name(name)
    try:
        data = decode_base64(rest)
    except ValueError as error:
        raise MalformedKey(f"{what} of {name!r}: {error}") from error
    if len(data) != size:
        raise MalformedKey(f"{what} of {name!r} has {len(data)} bytes instead of {size}")
    return name, data


@dataclass(frozen=True, slots=True, order=True)
class Signature:
    """`name:base64` of 64 raw Ed25519 bytes."""

    key_name: str
    data: bytes

    @classmethod
    def parse(cls, text: str) -> Signature:
        """The value of a `Sig:` line."""
        return cls(*_split(text, crypto_sign_BYTES, "signature"))

    def __str__(self) -> str:
        return f"{self.key_name}:{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """`name:base64` of 32 raw bytes."""

    name: str
    data: bytes

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """A line of `trusted-public-keys`; surrounding white space is allowed."""
        return cls(*_split(text.strip(), crypto_sign_PUBLICKEYBYTES, "public key"))

    def verifies(self, message: bytes, signature: Signature) -> bool:
        """Whether the signature carries this key's name and is its Ed25519 over the message."""
        if signature.key_name != self.name:
            return False
        try:
            VerifyKey(self.data).verify(message, signature.data)
        except (BadSignatureError, ValueError):
            return False
        return True

    def __str__(self) -> str:
        return f"{self.name}:{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True, slots=True)
class SecretKey:
    """`name:base64` of 64 bytes: the seed, then the public key. Never shown by repr."""

    name: str
    _signer: SigningKey = field(repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> SecretKey:
        """The contents of a secret key file; a trailing newline is allowed."""
        name, data = _split(text.strip(), crypto_sign_SECRETKEYBYTES, "secret key")
        signer = SigningKey(data[:32])
        if signer.verify_key.encode() != data[32:]:
            raise MalformedKey(f"secret key {name!r}: its two halves do not belong together")
        return cls(name, signer)

    @classmethod
    def from_seed(cls, name: str, seed: bytes) -> SecretKey:
        """A key pair from 32 random bytes."""
        return cls(check_key_name(name), SigningKey(seed))

    @property
    def public(self) -> PublicKey:
        """The public half, under the same name."""
        return PublicKey(self.name, self._signer.verify_key.encode())

    def sign(self, message: bytes) -> Signature:
        """Raw Ed25519 over the message."""
        return Signature(self.name, self._signer.sign(message).signature)

    def render(self) -> str:
        """The file's contents, without a newline, as Nix writes them."""
        data = self._signer.encode() + self._signer.verify_key.encode()
        return f"{self.name}:{base64.b64encode(data).decode()}"

"""What may be signed, from the specifications alone: this imports nothing of narseal.

Sources: Nix manual ("Store Path Specification", "Nix32 Encoding", "Nix Archive (NAR) Format"), the
fingerprint of `ValidPathInfo`, RFC 8032 by `cryptography`. What is made here is looked for in what
narseal served; if narseal and this read a format otherwise, the property fails.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"
_PLAIN_FILE = [b"nix-archive-1", b"(", b"type", b"regular", b"contents"]


def nix32(data: bytes) -> str:
    """Nix32: five bits a character, from the last byte to the first."""
    bits = "".join(f"{byte:08b}" for byte in reversed(data))
    bits = bits.zfill(-(-len(bits) // 5) * 5)
    return "".join(_ALPHABET[int(bits[at : at + 5], 2)] for at in range(0, len(bits), 5))


def made(kind: str, digest: bytes, store_dir: str, name: str) -> str:
    """The base name of a store path of some kind over an inner SHA-256."""
    text = f"{kind}:sha256:{digest.hex()}:{store_dir}:{name}"
    folded = bytearray(20)
    for place, byte in enumerate(hashlib.sha256(text.encode()).digest()):
        folded[place % 20] ^= byte
    return f"{nix32(bytes(folded))}-{name}"


@dataclass(frozen=True)
class Answer:
    """A narinfo's lines, read as plainly as can be."""

    fields: Mapping[str, str]
    signatures: tuple[tuple[str, bytes], ...]

    @classmethod
    def read(cls, text: bytes) -> Answer:
        """Every line is `Name: value`; every name but Sig stands there once."""
        fields: dict[str, str] = {}
        signatures = []
        for line in text.decode("ascii").splitlines():
            name, _, value = line.partition(": ")
            if name == "Sig":
                key, _, data = value.partition(":")
                signatures.append((key, base64.b64decode(data, validate=True)))
            else:
                assert name not in fields, f"{name} stands there twice"
                fields[name] = value
        return cls(fields, tuple(signatures))

    @property
    def path(self) -> str:
        """Its full store path."""
        return self.fields["StorePath"]

    @property
    def references(self) -> list[str]:
        """Base names, as they stand there."""
        return self.fields.get("References", "").split()

    @property
    def message(self) -> bytes:
        """The text under its signatures."""
        store_dir = self.path.rpartition("/")[0]
        refs = ",".join(sorted({f"{store_dir}/{name}" for name in self.references}))
        fields = self.fields
        return f"1;{self.path};{fields['NarHash']};{fields['NarSize']};{refs}".encode()

    def is_signed_by(self, keys: Iterable[tuple[str, bytes]]) -> bool:
        """Whether one of some keys (name, 32 bytes) signed just this."""
        return any(
            _verifies(public, data, self.message)
            for name, public in keys
            for key, data in self.signatures
            if key == name
        )


def _verifies(public: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except InvalidSignature:
        return False
    return True


@dataclass(frozen=True)
class Trust:
    """What the operator said, in this file's own terms."""

    #: Name and 32 bytes of keys whose signature covers a whole fingerprint.
    keys: tuple[tuple[str, bytes], ...] = ()
    #: Whoever brought it is trusted with the path's name; the bytes are measured.
    is_named: bool = False
    #: … and with its references, although the NAR may not hold them.
    may_lack_references: bool = False


def problem(answer: Answer, nar: bytes | None, trust: Trust) -> str | None:
    """Why an answer must not carry the operator's signature; None if there is evidence for it.

    `nar` are the bytes of its NAR as they can be had, None if they cannot.
    """
    if answer.is_signed_by(trust.keys):
        return None
    if nar is None:
        return "no trusted signature, and no bytes to measure"
    if int(answer.fields["NarSize"]) != len(nar):
        return f"NarSize {answer.fields['NarSize']} of {len(nar)} bytes"
    if answer.fields["NarHash"] != f"sha256:{nix32(hashlib.sha256(nar).digest())}":
        return "NarHash is not that of the bytes"
    if "CA" in answer.fields and _is_addressed(answer, nar):
        return None
    if not trust.is_named:
        return "neither a trusted signature nor a content address that holds"
    missing = [r for r in answer.references if r[:32].encode() not in nar]
    if missing and not trust.may_lack_references:
        return f"references that its NAR does not hold: {missing}"
    return None


def _is_addressed(answer: Answer, nar: bytes) -> bool:
    """Whether the path is the one that its CA gives, and the CA is that of the bytes."""
    store_dir, _, base = answer.path.rpartition("/")
    own, name = base[:32], base[33:]
    match = re.fullmatch(r"(text|fixed(?::r|:git)?):([a-z0-9]+):(.+)", answer.fields["CA"])
    if not match:
        return False
    method, algorithm, said = match.groups()
    others = sorted({f"{store_dir}/{r}" for r in answer.references if r != base})
    refers_to_itself = base in answer.references
    if method == "fixed:r":
        hashed = nar.replace(own.encode(), bytes(32)) if refers_to_itself else nar
    elif method == "fixed:git" or (contents := _contents(nar)) is None:
        return False
    else:
        hashed = contents
    digest = hashlib.new(algorithm, hashed).digest()
    if said not in (nix32(digest), digest.hex()):
        return False
    if method == "text":
        wanted = made(":".join(["text", *others]), digest, store_dir, name)
        return base == wanted and not refers_to_itself
    if method == "fixed:r" and algorithm == "sha256":
        kind = ":".join(["source", *others, *(["self"] if refers_to_itself else [])])
        return base == made(kind, digest, store_dir, name)
    prefix = "r:" if method == "fixed:r" else ""
    inner = hashlib.sha256(f"fixed:out:{prefix}{algorithm}:{digest.hex()}:".encode()).digest()
    return base == made("output:out", inner, store_dir, name) and not answer.references


def _contents(nar: bytes) -> bytes | None:
    """What a NAR of one plain file holds; None of any other."""
    begin = b"".join(map(_string, _PLAIN_FILE))
    end = _string(b")")
    if not nar.startswith(begin) or not nar.endswith(end):
        return None
    size = int.from_bytes(nar[len(begin) : len(begin) + 8], "little")
    contents = nar[len(begin) + 8 : len(begin) + 8 + size]
    return contents if begin + _string(contents) + end == nar else None


def _string(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + bytes(-len(text) % 8)

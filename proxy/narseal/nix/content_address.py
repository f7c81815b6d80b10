"""The `CA` field, and the store path that follows from it (Nix manual, "Content-addressing")."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from narseal.errors import MalformedContentAddress, MalformedHash
from narseal.nix import base32
from narseal.nix.hashes import Hash
from narseal.nix.store_path import StorePath


class Method(Enum):
    """How the content was hashed; the value is the field's prefix."""

    TEXT = "text:"
    FLAT = "fixed:"
    NAR = "fixed:r:"
    GIT = "fixed:git:"


@dataclass(frozen=True, slots=True)
class ContentAddress:
    """`text:sha256:…`, `fixed:…`, `fixed:r:…` or `fixed:git:…`."""

    method: Method
    hash: Hash

    @classmethod
    def parse(cls, text: str) -> ContentAddress:
        """The value of a `CA:` line; the hash in any of Nix's spellings with a colon."""
        for method in (Method.NAR, Method.GIT, Method.TEXT, Method.FLAT):
            if text.startswith(method.value):
                try:
                    found = Hash.parse(text[len(method.value) :])
                except MalformedHash as error:
                    raise MalformedContentAddress(f"CA: {error}") from error
                if method is Method.TEXT and found.algorithm != "sha256":
                    raise MalformedContentAddress("CA: text is always hashed with sha256")
                return cls(method, found)
        raise MalformedContentAddress(f"CA is neither text: nor fixed: {text[:80]!r}")

    @property
    def is_evidence(self) -> bool:
        """Whether a NAR held to it can be no other: what git hashes is not recomputed here.

        MD5 and SHA-1 are held to their content, too, but anybody can make two contents for them.
        """
        return self.method is not Method.GIT and self.hash.algorithm in ("sha256", "sha512")

    def store_path(
        self, name: str, references: Iterable[StorePath], *, self_hash: str, store_dir: str
    ) -> StorePath | None:
        """The path of this content; None where Nix has none (flat or git with references).

        `references` may hold the path itself, known by its hash part `self_hash`.
        """
        refs = sorted({ref.full(store_dir) for ref in references if ref.hash_part != self_hash})
        own = any(ref.hash_part == self_hash for ref in references)
        if self.method is Method.TEXT:
            return None if own else _make(":".join(["text", *refs]), self.hash, name, store_dir)
        if self.method is Method.NAR and self.hash.algorithm == "sha256":
            kind = ":".join(["source", *refs, *(["self"] if own else [])])
            return _make(kind, self.hash, name, store_dir)
        if refs or own:
            return None
        prefix = self.method.value.removeprefix("fixed:")
        inner = Hash.sha256(f"fixed:out:{prefix}{self.hash.algorithm}:{self.hash.hex}:".encode())
        return _make("output:out", inner, name, store_dir)

    def __str__(self) -> str:
        return f"{self.method.value}{self.hash}"


def _make(kind: str, inner: Hash, name: str, store_dir: str) -> StorePath:
    text = f"{kind}:sha256:{inner.hex}:{store_dir}:{name}"
    digest = hashlib.sha256(text.encode()).digest()
    folded = bytearray(20)
    for index, byte in enumerate(digest):
        folded[index % 20] ^= byte
    return StorePath(base32.encode(bytes(folded)), name)

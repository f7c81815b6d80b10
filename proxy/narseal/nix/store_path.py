"""Store paths: `<32 nix32>-<name>` below a store directory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from narseal.errors import MalformedStorePath
from narseal.nix.base32 import CHARS

HASH_LENGTH = 32
_NAME_LENGTH = 211
_HASH = re.compile(f"{CHARS}{{32}}", re.ASCII)
_NAME = re.compile(r"[0-9a-zA-Z+\-._?=]+", re.ASCII)
_DOTS = re.compile(r"\.{1,2}(-.*)?", re.ASCII)
_DIR = re.compile(r"(/[0-9a-zA-Z+\-._?=]+)+", re.ASCII)


def is_hash_part(text: str) -> bool:
    """Whether text is 32 characters of nix32."""
    return _HASH.fullmatch(text) is not None


def check_store_dir(text: str) -> str:
    """A store directory as Nix compares it: absolute, no trailing slash; MalformedStorePath else."""
    if not _DIR.fullmatch(text) or "/." in text:
        raise MalformedStorePath(f"not a store directory: {text[:200]!r}")
    return text


@dataclass(frozen=True, slots=True, order=True)
class StorePath:
    """The base name of a store path, in its two parts."""

    hash_part: str
    name: str

    def __post_init__(self) -> None:
        if not is_hash_part(self.hash_part):
            raise MalformedStorePath(f"not 32 nix32 characters: {self.hash_part[:80]!r}")
        if (
            len(self.name) > _NAME_LENGTH
            or not _NAME.fullmatch(self.name)
            or _DOTS.fullmatch(self.name)
        ):
            raise MalformedStorePath(f"not a store path's name: {self.name[:240]!r}")

    @classmethod
    def parse(cls, text: str) -> StorePath:
        """`<hash>-<name>`, without a directory."""
        if text[HASH_LENGTH : HASH_LENGTH + 1] != "-":
            raise MalformedStorePath(f"not <hash>-<name>: {text[:240]!r}")
        return cls(text[:HASH_LENGTH], text[HASH_LENGTH + 1 :])

    @classmethod
    def parse_full(cls, text: str, store_dir: str) -> StorePath:
        """`<store_dir>/<hash>-<name>`; another directory is MalformedStorePath."""
        prefix = store_dir + "/"
        if not text.startswith(prefix):
            raise MalformedStorePath(f"not below {store_dir}: {text[:240]!r}")
        return cls.parse(text[len(prefix) :])

    def full(self, store_dir: str) -> str:
        """The path with its directory."""
        return f"{store_dir}/{self.hash_part}-{self.name}"

    def __str__(self) -> str:
        return f"{self.hash_part}-{self.name}"

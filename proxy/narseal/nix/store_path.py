"""Store paths, `<32 nix32>-<name>` below a store directory, and what a path refers to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import eq
from typing import Self, overload

from narseal.errors import MalformedStorePath
from narseal.nix.base32 import CHARS

HASH_LENGTH = 32
_NAME_LENGTH = 211
_HASH = re.compile(f"{CHARS}{{32}}", re.ASCII)
_NAME = re.compile(r"[0-9a-zA-Z+\-._?=]+", re.ASCII)
_DOTS = re.compile(r"\.{1,2}(-.*)?", re.ASCII)
#: Any number of base names with a space behind each: StorePath's own rules, in one go.
_MANY = re.compile(
    rf"(?:{CHARS}{{32}}-(?!\.{{1,2}}[- ])[0-9a-zA-Z+\-._?=]{{1,{_NAME_LENGTH}}}+ )*+", re.ASCII
)
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


class References(Sequence[StorePath]):
    """What a path refers to: sorted, each once, no two of the same hash part.

    One text, because there may be 20,000: it is held to the rules as a whole, and each becomes a
    value only where somebody asks for it.
    """

    __slots__ = ("text",)

    def __init__(self, paths: Iterable[StorePath] = ()) -> None:
        """MalformedStorePath if two have the same hash part."""
        #: Base names in order, with a space between two.
        self.text = _in_order(map(str, paths))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Base names with spaces between them, in any order; one may stand there twice."""
        texts = [each for each in dict.fromkeys(text.split(" ")) if each]
        if not _MANY.fullmatch("".join([f"{each} " for each in texts])):
            return cls(map(StorePath.parse, texts))  # the first that is none says why
        found = cls()
        found.text = _in_order(texts)
        return found

    def hash_parts(self) -> Iterator[str]:
        """Those of all, in order."""
        return (text[:HASH_LENGTH] for text in (self.text.split(" ") if self.text else ()))

    def with_hash_part(self, hash_part: str) -> StorePath | None:
        """The one of a hash part."""
        at = 0 if self.text.startswith(hash_part) else self.text.find(f" {hash_part}-") + 1
        if not self.text.startswith(f"{hash_part}-", at):
            return None
        return StorePath.parse(self.text[at:].partition(" ")[0])

    def __len__(self) -> int:
        return self.text.count(" ") + 1 if self.text else 0

    def __iter__(self) -> Iterator[StorePath]:
        return map(StorePath.parse, self.text.split(" ") if self.text else ())

    @overload
    def __getitem__(self, at: int) -> StorePath: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[StorePath, ...]: ...
    def __getitem__(self, at: int | slice) -> StorePath | tuple[StorePath, ...]:
        return tuple(self)[at]

    def __eq__(self, other: object) -> bool:
        return self.text == other.text if isinstance(other, References) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"References.parse({self.text!r})"


def _in_order(texts: Iterable[str]) -> str:
    found = sorted(texts)
    parts = [text[:HASH_LENGTH] for text in found]
    if any(map(eq, parts, parts[1:])):
        raise MalformedStorePath("two paths with the same hash part")
    return " ".join(found)

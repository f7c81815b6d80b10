"""NAR archives: the trees that they hold, and a writer (`nar_reader` reads).

Format: Nix manual, "Nix Archive (NAR) format".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

MAGIC = b"nix-archive-1"


@dataclass(frozen=True, slots=True)
class Regular:
    """A file and its executable bit."""

    contents: bytes
    executable: bool = False


@dataclass(frozen=True, slots=True)
class Symlink:
    """A symbolic link."""

    target: bytes


@dataclass(frozen=True, slots=True)
class Directory:
    """Nodes by name; written in bytewise order whatever the mapping's."""

    entries: Mapping[bytes, Node]


@dataclass(frozen=True, slots=True)
class Streamed:
    """A regular file whose contents are read when it is their turn."""

    size: int
    #: Gives `size` bytes in all.
    pieces: Callable[[], Iterable[bytes]]
    executable: bool = False


Node = Regular | Symlink | Directory | Streamed


def render(node: Node) -> Iterator[bytes]:
    """The NAR of a tree, in pieces."""
    yield string(MAGIC)
    yield from _render(node)


def _render(node: Node) -> Iterator[bytes]:
    if isinstance(node, Regular | Streamed):
        mark = strings(b"executable", b"") if node.executable else b""
        yield strings(b"(", b"type", b"regular") + mark + string(b"contents")
        if isinstance(node, Regular):
            yield string(node.contents)
        else:
            yield node.size.to_bytes(8, "little")
            yield from node.pieces()
            yield bytes(-node.size % 8)
        yield string(b")")
    elif isinstance(node, Symlink):
        yield strings(b"(", b"type", b"symlink", b"target", node.target, b")")
    else:
        yield strings(b"(", b"type", b"directory")
        for name, child in sorted(node.entries.items()):
            yield strings(b"entry", b"(", b"name", name, b"node")
            yield from _render(child)
            yield string(b")")
        yield string(b")")


def string(text: bytes) -> bytes:
    """Bytes as a NAR holds them: their count, themselves, zeros up to a multiple of 8."""
    return len(text).to_bytes(8, "little") + text + bytes(-len(text) % 8)


def strings(*texts: bytes) -> bytes:
    """Several behind each other."""
    return b"".join(map(string, texts))

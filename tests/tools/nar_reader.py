"""The NAR grammar read token by token: slow and plain, beside which the product's reader is held."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator

from narseal.errors import ContentMismatch, MalformedNar
from narseal.nix import nar
from narseal.nix.hashes import Hash
from narseal.nix.nar import MAGIC
from narseal.nix.nar_reader import MAX_DEPTH, NarSummary

_MAX_NAME = 255
_MAX_TARGET = 4095
_MAX_TOKEN = 16
_CASE_HACK = b"~nix~case~hack~"

#: Every kind of node and of neighbour, names and contents of every padding, an empty folder at the end.
EVERYTHING = nar.Directory(
    {
        b"a": nar.Regular(b""),
        b"a+": nar.Regular(b"12345678"),
        b"b": nar.Directory(
            {
                b"1": nar.Symlink(b"../a"),
                b"12": nar.Regular(b"x" * 9, executable=True),
                b"123": nar.Directory({b"in": nar.Directory({b"deep": nar.Regular(b"1234567")})}),
            }
        ),
        b"b12345": nar.Symlink(b"12345678"),
        b"c123456": nar.Regular(b"123", executable=True),
        b"d1234567": nar.Directory({}),
        "\u00e9\u4000".encode(): nar.Regular(b"x"),
        b"\xff" * 9: nar.Directory({b"\4": nar.Directory({})}),
    }
)


class ReferenceNarReader:
    """A push parser: `feed` bytes in any portions, then `finish`.

    `max_size` bounds the bytes taken. `on_contents` gets the contents of the regular files,
    in pieces; `on_file` the path of each below the root, before its contents. Memory is constant
    but for the depth. Raises MalformedNar with the offset, and ContentMismatch beyond `max_size`.
    """

    def __init__(
        self,
        *,
        max_size: int,
        on_contents: Callable[[bytes | memoryview], object] | None = None,
        on_file: Callable[[bytes], object] | None = None,
    ) -> None:
        self._max_size = max_size
        self._on_contents = on_contents
        self._on_file = on_file
        self._names: list[bytes] = []  # the last name taken in each open directory
        self._hash = hashlib.sha256()
        self._size = 0
        self._taken = 0
        self._pending = bytearray()
        self._plain_file = False
        self._done = False
        self._parser = self._archive()
        self._wanted = next(self._parser)

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the NAR."""
        self._size += len(data)
        if self._size > self._max_size:
            raise ContentMismatch(
                "nar-size", f"the NAR is longer than the {self._max_size} bytes that were signed"
            )
        self._hash.update(data)
        view = memoryview(data)
        while view:
            if self._done:
                raise self._malformed("bytes behind the end of the archive")
            view = view[self._step(view) :]

    def finish(self) -> NarSummary:
        """What was read; MalformedNar if the archive was not complete."""
        if not self._done:
            raise self._malformed("the archive is cut off", offset=self._size)
        digest = Hash("sha256", self._hash.digest())
        return NarSummary(digest, self._size, self._plain_file)

    def _step(self, view: memoryview) -> int:
        """Give the parser what it waits for out of view; returns the bytes used."""
        wanted = self._wanted
        if wanted < 0:  # contents: any portion will do
            used = min(-wanted, len(view))
            self._send(view[:used])
            return used
        if not self._pending and len(view) >= wanted:
            self._send(view[:wanted])
            return wanted
        used = min(wanted - len(self._pending), len(view))
        self._pending += view[:used]
        if len(self._pending) == wanted:
            whole, self._pending = bytes(self._pending), bytearray()
            self._send(whole)
        return used

    def _send(self, data: bytes | memoryview) -> None:
        self._taken += len(data)
        try:
            self._wanted = self._parser.send(data)
        except StopIteration:
            self._done = True

    def _malformed(self, message: str, offset: int | None = None) -> MalformedNar:
        return MalformedNar(message, offset=self._taken if offset is None else offset)

    # The grammar, as generators that yield the number of bytes they need next (negative: a
    # portion of contents of at most that many) and are sent those bytes.

    def _archive(self) -> Generator[int, bytes | memoryview, None]:
        yield from self._expect(MAGIC)
        stack = self._names
        opened = yield from self._node()
        plain_file = self._plain_file
        if opened:
            stack.append(b"")
        while stack:
            token = yield from self._string(_MAX_TOKEN)
            if token == b")":
                stack.pop()
                if stack:
                    yield from self._expect(b")")  # of the entry that held the directory
            elif token == b"entry":
                stack[-1] = yield from self._entry_name(stack[-1])
                if (yield from self._node()):
                    if len(stack) >= MAX_DEPTH:
                        raise self._malformed(f"deeper than {MAX_DEPTH} directories")
                    stack.append(b"")
                else:
                    yield from self._expect(b")")
            else:
                raise self._malformed(f"neither an entry nor an end: {token!r}")
        self._plain_file = plain_file

    def _node(self) -> Generator[int, bytes | memoryview, bool]:
        """One node's beginning; True if it opened a directory, else the node is complete."""
        yield from self._expect(b"(")
        yield from self._expect(b"type")
        kind = yield from self._string(_MAX_TOKEN)
        if kind == b"directory":
            return True
        if kind == b"symlink":
            yield from self._expect(b"target")
            target = yield from self._string(_MAX_TARGET)
            if not target or b"\0" in target:
                raise self._malformed("a symlink's target is empty or holds NUL")
            yield from self._expect(b")")
        elif kind == b"regular":
            if self._on_file:
                self._on_file(b"/".join(self._names))
            yield from self._regular()
        else:
            raise self._malformed(f"unknown type {kind!r}")
        return False

    def _regular(self) -> Generator[int, bytes | memoryview, None]:
        token = yield from self._string(_MAX_TOKEN)
        self._plain_file = token != b"executable"
        if token == b"executable":
            yield from self._expect(b"")
            token = yield from self._string(_MAX_TOKEN)
        if token != b"contents":
            raise self._malformed(f"unknown token in a regular file: {token!r}")
        yield from self._contents()
        yield from self._expect(b")")

    def _contents(self) -> Generator[int, bytes | memoryview, None]:
        size = int.from_bytes((yield 8), "little")
        left = size
        while left:
            portion = yield -left
            left -= len(portion)
            if self._on_contents:
                self._on_contents(portion)
        yield from self._padding(size)

    def _entry_name(self, previous: bytes) -> Generator[int, bytes | memoryview, bytes]:
        yield from self._expect(b"(")
        yield from self._expect(b"name")
        name = yield from self._string(_MAX_NAME)
        if name in (b"", b".", b"..") or b"/" in name or b"\0" in name or _CASE_HACK in name:
            raise self._malformed(f"not a file name: {name!r}")
        if name <= previous:
            raise self._malformed(f"names not sorted or twice: {name!r}")
        yield from self._expect(b"node")
        return name

    def _expect(self, token: bytes) -> Generator[int, bytes | memoryview, None]:
        found = yield from self._string(max(len(token), _MAX_TOKEN))
        if found != token:
            raise self._malformed(f"{found!r} where {token!r} is due")

    def _string(self, bound: int) -> Generator[int, bytes | memoryview, bytes]:
        size = int.from_bytes((yield 8), "little")
        if size > bound:
            raise self._malformed(f"a string of {size} bytes where at most {bound} may stand")
        text = bytes((yield size)) if size else b""
        yield from self._padding(size)
        return text

    def _padding(self, size: int) -> Generator[int, bytes | memoryview, None]:
        if size % 8 and any((yield 8 - size % 8)):
            raise self._malformed("padding that is not zero")

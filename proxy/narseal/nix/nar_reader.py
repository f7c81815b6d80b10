"""A streaming reader of NAR archives that validates and hashes.

It accepts only the canonical form: exact tokens, zero padding, names sorted and unique, a bounded
depth, nothing behind the end. What stands between a name and a file's contents is compared as one
string, and names are checked many at a time, which is what makes trees of tiny files cheap; all that
is unusual, wrong or not whole is left to a second, careful way.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass

from narseal.errors import ContentMismatch, MalformedNar
from narseal.nix.hashes import Hash
from narseal.nix.nar import MAGIC, string, strings

MAX_DEPTH = 64
_MAX_NAME = 255
_MAX_TARGET = 4095
_CASE_HACK = b"~nix~case~hack~"
_ODD_NAMES = frozenset((b".", b".."))


# The grammar as the byte strings that it writes. What is padded behind `n` bytes is found at n & 7.
_BEGIN = strings(MAGIC, b"(", b"type")
_END = string(b")")
_ENDS = strings(b")", b")")  # of a node and of the entry that holds it
_ENTRY = {
    strings(b"entry", b"(", b"name") + size.to_bytes(8, "little"): size
    for size in range(1, _MAX_NAME + 1)
}
_ENTRY_SIZE = len(next(iter(_ENTRY)))
_NODE = [bytes(-size % 8) + strings(b"node", b"(", b"type") for size in range(8)]
_DIRECTORY = string(b"directory")
_SYMLINK = strings(b"symlink", b"target")
_REGULAR = string(b"regular")
_CONTENTS = string(b"contents")
_EXECUTABLE = strings(b"executable", b"")
_PLAIN = [node + _REGULAR + _CONTENTS for node in _NODE]
_PLAIN_SIZE = [len(head) + 8 for head in _PLAIN]
_EXECUTED = [node + _REGULAR + _EXECUTABLE + _CONTENTS for node in _NODE]
_EXECUTED_SIZE = [len(head) + 8 for head in _EXECUTED]
_LINK = [node + _SYMLINK for node in _NODE]
_LINK_SIZE = [len(head) + 8 for head in _LINK]
_FOLDER = [node + _DIRECTORY for node in _NODE]
_PADDED_END = [bytes(-size % 8) + _END for size in range(8)]
_PADDED_ENDS = [bytes(-size % 8) + _ENDS for size in range(8)]
_LONGEST = 8192  # an entry without the contents of a file takes less
_number = struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True)
class NarSummary:
    """What a whole, valid NAR turned out to be."""

    nar_hash: Hash
    nar_size: int
    #: True when the root is one regular file without the executable bit.
    is_plain_file: bool


def _is_target(data: bytes, start: int, stop: int) -> bool:
    """Whether a symlink may point there."""
    return 0 < stop - start <= _MAX_TARGET and data.find(0, start, stop) < 0


class NarReader:
    """A push parser: `feed` bytes in any portions, then `finish`.

    `max_size` bounds the bytes taken. `on_contents` gets the contents of the regular files,
    in pieces; `on_file` the path of each below the root, before its contents; both may get some of
    what is refused a little later. Memory is constant but for the depth. Raises MalformedNar with the offset, at the latest from `finish`, and
    ContentMismatch beyond `max_size`.
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
        self._hash = hashlib.sha256()
        self._size = 0
        self._names: list[bytes] = []  # the last name taken in each open directory
        self._left = 0  # bytes of a file's contents that did not come yet
        self._due = b""  # what must stand behind them
        self._pending = b""  # more is needed to tell what it is
        self._plain_file = False
        self._done = False
        # each takes what is whole behind an offset, and returns where that ends, or -1
        self._next: Callable[[bytes, int], int] = self._begin

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the NAR."""
        self._size += len(data)
        if self._size > self._max_size:
            raise ContentMismatch(
                "nar-size", f"the NAR is longer than the {self._max_size} bytes that were signed"
            )
        self._hash.update(data)
        if self._left:
            data = data[self._take_contents(memoryview(data)) :]
        if self._pending:
            data = self._pending + data
        at = 0
        while at < len(data) and (end := self._next(data, at)) >= 0:
            at = end
        self._pending = data[at:]
        if len(self._pending) >= _LONGEST:
            raise self._malformed(data, at, "neither an entry nor an end")

    def finish(self) -> NarSummary:
        """What was read; MalformedNar if the archive was not complete."""
        if not self._done:
            raise self._malformed(self._pending, 0, "the archive is cut off, or is none")
        digest = Hash("sha256", self._hash.digest())
        return NarSummary(digest, self._size, self._plain_file)

    def _malformed(self, data: bytes, at: int, message: str) -> MalformedNar:
        """About what stands at an offset of the bytes that came last."""
        found = f": {data[at : at + 64]!r}" if data[at:] else ""
        return MalformedNar(message + found, offset=self._size - len(data) + at)

    def _begin(self, data: bytes, at: int) -> int:
        if not data.startswith(_BEGIN, at):
            return -1
        return self._node(data, at + len(_BEGIN), _PADDED_END)

    def _behind(self, data: bytes, at: int) -> int:
        raise self._malformed(data, at, "bytes behind the end of the archive")

    def _closed(self) -> None:
        """A node is complete, and the entry that holds it."""
        self._done = not self._names
        self._next = self._behind if self._done else self._entries

    def _entries(self, data: bytes, at: int) -> int:
        """All that is whole and as it should be; where nothing is, one entry or end by itself."""
        begun = at
        path = self._names
        names: list[bytes] = []
        while True:
            at, size = self._files(data, at, names)
            behind = at + _ENTRY_SIZE + size
            name = data[at + _ENTRY_SIZE : behind]
            folder = _FOLDER[size & 7]
            if not size and len(path) > 1 and data.startswith(_ENDS, at):
                path.pop()
                at += len(_ENDS)
            elif name > path[-1] and data.startswith(folder, behind) and len(path) < MAX_DEPTH:
                names.append(name)
                path[-1] = name
                path.append(b"")
                at = behind + len(folder)
            else:
                break
        self._check_names(names, data, at)
        if at > begun:
            return at
        return self._entry(data, at, size) if size else self._leave(data, at)

    def _files(self, data: bytes, at: int, names: list[bytes]) -> tuple[int, int]:
        """Files and symlinks of one directory that are whole and as they should be.

        Their names, which are in order, go to `names`. Returns where they end, and how many bytes
        the name has that follows; 0 if no entry does.
        """
        listens = self._on_file or self._on_contents
        previous = self._names[-1]
        while size := _ENTRY.get(data[at : at + _ENTRY_SIZE], 0):
            behind = at + _ENTRY_SIZE + size
            name = data[at + _ENTRY_SIZE : behind]
            shift = size & 7
            is_link = False
            if data.startswith(_PLAIN[shift], behind):
                start = behind + _PLAIN_SIZE[shift]
            elif data.startswith(_LINK[shift], behind):
                start = behind + _LINK_SIZE[shift]
                is_link = True
            elif data.startswith(_EXECUTED[shift], behind):
                start = behind + _EXECUTED_SIZE[shift]
            else:
                break
            if start > len(data):
                break
            (length,) = _number(data, start - 8)
            stop = start + length
            end = _PADDED_ENDS[length & 7]
            if (
                not data.startswith(end, stop)  # nor if not all of it is there
                or name <= previous
                or (is_link and not _is_target(data, start, stop))
            ):
                break
            if listens and not is_link:
                self._tell(name, data[start:stop])
            names.append(name)
            previous = name
            at = stop + len(end)
        self._names[-1] = previous
        return at, size

    def _tell(self, name: bytes, contents: bytes) -> None:
        """Of a whole file in the directory that is open."""
        self._names[-1] = name
        if self._on_file:
            self._on_file(b"/".join(self._names))
        if self._on_contents and contents:
            self._on_contents(contents)

    def _entry(self, data: bytes, at: int, size: int) -> int:
        """Any entry whose name has so many bytes, up to the end of its node's head."""
        behind = at + _ENTRY_SIZE + size
        node = _NODE[size & 7]
        if not data.startswith(node, behind):
            return -1
        previous, name = self._names[-1], data[at + _ENTRY_SIZE : behind]
        self._check_names([name], data, at)
        if name <= previous:
            raise self._malformed(data, at, "names not sorted or twice")
        self._names[-1] = name
        end = self._node(data, behind + len(node), _PADDED_ENDS)
        if end < 0:
            self._names[-1] = previous
        return end

    def _leave(self, data: bytes, at: int) -> int:
        """The end of a directory."""
        end = _ENDS if len(self._names) > 1 else _END
        if not data.startswith(end, at):
            return -1
        self._names.pop()
        self._closed()
        return at + len(end)

    def _check_names(self, names: list[bytes], data: bytes, at: int) -> None:
        whole = b"/".join(names)
        if (
            whole.count(b"/") >= max(len(names), 1)
            or b"\0" in whole
            or _CASE_HACK in whole
            or not _ODD_NAMES.isdisjoint(names)
        ):
            raise self._malformed(data, at, "not a file name, here or shortly before")

    def _node(self, data: bytes, at: int, ends: list[bytes]) -> int:
        """A node behind its `type`."""
        if data.startswith(_REGULAR, at):
            return self._regular(data, at + len(_REGULAR), ends)
        if data.startswith(_DIRECTORY, at):
            if len(self._names) >= MAX_DEPTH:
                raise self._malformed(data, at, f"deeper than {MAX_DEPTH} directories")
            self._names.append(b"")
            self._next = self._entries
            return at + len(_DIRECTORY)
        start = at + len(_SYMLINK) + 8
        if not data.startswith(_SYMLINK, at) or start > len(data):
            return -1
        stop = start + int.from_bytes(data[start - 8 : start], "little")
        if not _is_target(data, start, stop):
            raise self._malformed(data, at, "a symlink's target is empty, too long or holds NUL")
        end = ends[stop - start & 7]
        if not data.startswith(end, stop):
            return -1
        self._closed()
        return stop + len(end)

    def _regular(self, data: bytes, at: int, ends: list[bytes]) -> int:
        is_plain = not data.startswith(_EXECUTABLE, at)
        if not is_plain:
            at += len(_EXECUTABLE)
        start = at + len(_CONTENTS) + 8
        if not data.startswith(_CONTENTS, at) or start > len(data):
            return -1
        (self._left,) = _number(data, start - 8)
        self._due = ends[self._left & 7]
        self._plain_file = is_plain and not self._names
        if self._on_file:
            self._on_file(b"/".join(self._names))
        self._next = self._close
        return start + self._take_contents(memoryview(data)[start:])

    def _take_contents(self, view: memoryview) -> int:
        used = min(self._left, len(view))
        self._left -= used
        if self._on_contents and used:
            self._on_contents(view[:used])
        return used

    def _close(self, data: bytes, at: int) -> int:
        """The padding behind a file's contents, and the end of it."""
        if not data.startswith(self._due, at):
            if len(data) - at >= len(self._due):
                raise self._malformed(data, at, "not the end of a file")
            return -1
        self._closed()
        return at + len(self._due)

"""The memory that the workers of a machine share: who waits for what, how flights ended, how far files are."""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
from time import monotonic

#: Names share rows: who waits for one is woken for another at worst.
ROWS = 4096
#: Bytes of what is said of the end of a flight, one in each row.
OUTCOME = 512
#: Files of which each worker may say how far they are.
FILES = 256
#: Bytes of a worker's small things that are handed over in memory, before they are where all look for them.
BODIES = 2 << 20
#: Bytes of what a flight is known by.
KEY = 16
_BEAT = 16

# Of a file: its flight's key; its size, and how much of it may be read; its name. Both numbers bear a tag of the file's in
# their upper bits, so that a number is never taken for one of another file that has the place by now.
_SIZE, _RELEASED, _NAME_AT = KEY, KEY + 8, KEY + 16
_NAME = 64
_FILE = 128
_BYTES = (1 << 46) - 1
_WHOLE = 1 << 46
_TAG = 48


class Board:
    """What they share. To be made before they are forked; it lies in no folder, and ends with the last of them.

    Nothing in it is believed about the things themselves: whoever waited looks for them where they are kept.
    """

    def __init__(self, seats: int) -> None:
        """For at most so many workers at a time."""
        self.seats = seats
        #: So that nobody outside knows which names share a row.
        self.secret = secrets.token_bytes(32)
        ends, files = ROWS * 8, seats * FILES * _FILE
        self.outcomes = ends + seats * _BEAT
        self.files = self.outcomes + ROWS * OUTCOME
        self.bodies = self.files + files
        self.columns = self.bodies + seats * BODIES
        size = self.columns + seats * ROWS
        # never closed: closing any descriptor of a file lets go of the process's locks on it
        self.descriptor = os.memfd_create("narseal-flights", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, size)
        self.memory = mmap.mmap(self.descriptor, size)
        #: Of each row, a number that changes when a flight ends; who sits where, and when it said last that its loop
        #: runs; and what is said of files.
        self.cells = memoryview(self.memory).cast("Q")
        #: By seat: whoever sits there is to look what it is told.
        self.bells = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(seats)]

    def sit(self, seat: int) -> None:
        """Take a seat: what was said by who had it before is forgotten, and what it waited for."""
        column, files = self.columns + seat * ROWS, self.files + seat * FILES * _FILE
        self.memory[column : column + ROWS] = bytes(ROWS)
        self.memory[files : files + FILES * _FILE] = bytes(FILES * _FILE)
        self.beat(seat)
        self.cells[ROWS + 2 * seat] = os.getpid()

    def leave(self, seat: int) -> None:
        """Nobody sits there any more: another process may get the number of the one that did."""
        self.cells[ROWS + 2 * seat] = 0

    def beat(self, seat: int) -> None:
        """Say that the loop of who sits there runs."""
        self.cells[ROWS + 2 * seat + 1] = int(monotonic())

    def silence(self, process: int) -> float:
        """Seconds since a worker's loop ran."""
        seat = self.seat_of(process)
        return 0.0 if seat is None else monotonic() - self.cells[ROWS + 2 * seat + 1]

    def seat_of(self, process: int) -> int | None:
        """Where a worker sits."""
        taken = (seat for seat in range(self.seats) if self.cells[ROWS + 2 * seat] == process)
        return next(taken, None)


class Place:
    """Where one worker says how far a file is that it brings."""

    def __init__(self, board: Board, place: int, key: bytes, name: str) -> None:
        self._board = board
        self._at = board.files + place * _FILE
        self._tag = (secrets.randbits(16) | 1) << _TAG
        memory = board.memory
        encoded = name.encode()
        assert len(encoded) <= _NAME  # it is a number and 16 bytes in hexadecimal
        self.say(0, 0)
        memory[self._at + _NAME_AT : self._at + _NAME_AT + _NAME] = encoded.ljust(_NAME, b"\0")
        memory[self._at : self._at + KEY] = key

    def say(self, size: int, released: int, *, is_whole: bool = False) -> None:
        """So much of so much may be read; `is_whole`: and it was verified. In any thread."""
        cells, released = self._board.cells, released | (_WHOLE if is_whole else 0)
        cells[(self._at + _SIZE) // 8] = self._tag | size
        cells[(self._at + _RELEASED) // 8] = self._tag | released

    def end(self) -> None:
        """Say nothing any more."""
        self._board.memory[self._at : self._at + KEY] = bytes(KEY)
        self._board.cells[(self._at + _RELEASED) // 8] = 0


class Shown:
    """What another worker says of a file that it brings."""

    def __init__(self, board: Board, at: int, tag: int, name: str, by: int) -> None:
        self._cells = board.cells
        self._size_at = (at + _SIZE) // 8
        self._released_at = (at + _RELEASED) // 8
        self._tag = tag
        #: Where it lies among the files on their way.
        self.name = name
        self._memory = board.memory
        #: The process that brings it.
        self.by = by

    @classmethod
    def of(cls, board: Board, key: bytes, by: int) -> Shown | None:
        """What the process `by` says of the file of a flight; None if it says nothing."""
        if (seat := board.seat_of(by)) is None:
            return None
        memory, at = board.memory, board.files + seat * FILES * _FILE
        end = at + FILES * _FILE
        while (at := memory.find(key, at, end)) >= 0:
            if (at - board.files) % _FILE == 0:
                tag = board.cells[(at + _RELEASED) // 8] >> _TAG
                name = memory[at + _NAME_AT : at + _NAME_AT + _NAME].rstrip(b"\0").decode("ascii")
                shown = cls(board, at, tag, name, by)
                if shown.look() and memory[at : at + KEY] == key:
                    return shown
            at += 1
        return None

    def look(self) -> tuple[int, int, bool] | None:
        """Size, how much may be read, and whether it was verified; None: nothing is said of it any more."""
        released = self._cells[self._released_at]
        size = self._cells[self._size_at]
        if not self._tag or released >> _TAG != self._tag or size >> _TAG != self._tag:
            return None
        return size & _BYTES, released & _BYTES, bool(released & _WHOLE)

    @property
    def is_body(self) -> bool:
        """Whether the thing itself is in memory, and no file."""
        return self.name.startswith("@")

    def body(self, key: bytes) -> bytes | None:
        """The thing itself; None if something else is in its place by now."""
        at, _, digest = self.name[1:].partition("-")
        if (said := self.look()) is None:
            return None
        body = self._memory[int(at) : int(at) + said[0]]
        return body if digest == body_digest(body, key) else None


def body_digest(body: bytes, key: bytes) -> str:
    """What ties a thing in memory to its flight's key."""
    return hashlib.blake2b(body, digest_size=16, key=key).hexdigest()

"""Flights that the workers of a machine share: one brings a thing, the others wait, and learn how that ended.

Who brings a thing holds a lock of the kernel's on its number. So no two have it, and it is free when its holder ends,
whatever ended him. Who waits is told by an eventfd, and looks again in a moment if nobody tells him.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import secrets
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import TypeVar

from narseal.errors import NarsealError, heard, told
from narseal.runtime.board import (
    BODIES,
    FILES,
    KEY,
    OUTCOME,
    ROWS,
    Board,
    Place,
    Shown,
    body_digest,
)
from narseal.runtime.slots import aside, asker

T = TypeVar("T")

#: Seconds for which another worker is waited for; who has nothing then goes alone.
PATIENCE = 240.0
#: Seconds between two beats of a worker's loop, and those after which a worker that is silent is waited for no more.
_BEAT = 1.0
_SILENT = 10.0
#: Seconds between two looks whether it still brings the thing: nobody tells of a worker that was killed.
_LOOK = 0.25
#: Things that a worker brings at a time so that others wait for it, and those of one asker. Others are brought alone.
_MOST = 512
_EACH = 128
#: Of how a flight ended: key, check sum, when, mark, until when it holds for others, size of the text.
_HEAD = struct.Struct("=16s8sdQdH")
_FLOCK = struct.Struct("hhqqi")


class SharedFlights:
    """One worker's, on its seat at the board. Made inside its loop."""

    def __init__(self, board: Board, seat: int, *, kin: int, on_joined: Callable[[], None]) -> None:
        """Only workers with the same `kin` share: those of one configuration."""
        self._board = board
        self._seat = seat
        self._kin = kin.to_bytes(8, "little")
        self._on_joined = on_joined
        #: Numbers that we have: locks are the process's, and bar nobody in it.
        self._held: set[int] = set()
        self._numbers = secrets.randbits(48)
        self._taken = 0  # of the room for those
        self._by_asker: Counter[str] = Counter()
        self._watched: dict[int, Watched] = {}
        self._bodies = 0  # of their room, up to where the last one is
        self._free_files = list(range(seat * FILES, (seat + 1) * FILES))
        board.sit(seat)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(board.bells[seat], self._rung)
        self._beating = self._loop.call_later(_BEAT, self._beat)

    def close(self) -> None:
        """Hear nothing any more."""
        self._loop.remove_reader(self._board.bells[self._seat])
        self._beating.cancel()
        self._board.leave(self._seat)

    def _beat(self) -> None:
        self._board.beat(self._seat)
        self._beating = self._loop.call_later(_BEAT, self._beat)

    def flight(self, name: str) -> Flight:
        """The flight of a name, whoever's it is."""
        digest = hashlib.blake2b(
            name.encode(), digest_size=KEY, key=self._board.secret, person=self._kin
        ).digest()
        return Flight(self, self._board, digest)

    async def once(
        self,
        name: str,
        look: Callable[[], Awaitable[T | None]],
        bring: Callable[[], Awaitable[T]],
        lasting: Lasting,
    ) -> T:
        """What `look` finds where all workers keep it; else what `bring` brings there, in one of them.

        Raises what either does, or what another worker's flight ended with.
        """
        flight, began, deadline = self.flight(name), monotonic(), None
        while True:
            ends = flight.ends
            if (found := await look()) is not None:
                return found
            flight.check(began, lasting)
            if flight.begin():
                try:
                    if flight.ends != ends:  # one ended after we looked
                        if (found := await look()) is not None:
                            return found
                        flight.check(began, lasting)
                    return await flight.telling(bring, lasting)
                finally:
                    flight.end()
            if flight.is_stuck or (deadline and monotonic() >= deadline):
                return await bring()
            if deadline is None:
                deadline = began + PATIENCE
                self._on_joined()
            async with aside():  # who waits for another's flight must not keep it from its turn
                await flight.over(deadline)

    def _rung(self) -> None:
        """Wake those of us who wait for a row of which there is news."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._board.bells[self._seat])
        memory, column = self._board.memory, self._board.columns + self._seat * ROWS
        at = memory.find(b"\2", column, column + ROWS)
        while at >= 0:
            watched = self._watched.get(at - column)
            memory[at] = 1 if watched else 0
            if watched:
                watched.tell()
            at = memory.find(b"\2", at + 1, column + ROWS)

    def ring(self, row: int) -> None:
        """Tell all who wait for a row that there is news. In any thread."""
        memory, start = self._board.memory, self._board.columns + row
        waiting = memory[start::ROWS]
        if not any(waiting):
            return
        for seat, state in enumerate(waiting):
            if state:
                memory[start + seat * ROWS] = 2
                with suppress(BlockingIOError):  # it was rung so often that it surely hears it
                    os.eventfd_write(self._board.bells[seat], 1)

    def is_watched(self, row: int) -> bool:
        """Whether somebody waits for something in a row."""
        return any(self._board.memory[self._board.columns + row :: ROWS])

    @contextmanager
    def watching(self, row: int) -> Iterator[Watched]:
        """Hear news of a row within."""
        at = self._board.columns + self._seat * ROWS + row
        watched = self._watched.setdefault(row, Watched())
        watched.by += 1
        self._board.memory[at] = 1
        try:
            yield watched
        finally:
            watched.by -= 1
            if not watched.by:
                del self._watched[row]
                self._board.memory[at] = 0

    def take(self, number: int) -> bool:
        """Whether nobody had a number: it is ours then."""
        if number in self._held:
            return False
        if not _lock(self._board.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, number):
            return False
        self._held.add(number)
        return True

    def has(self, number: int) -> bool:
        """Whether we have a number."""
        return number in self._held

    def give(self, number: int) -> None:
        """Give it back."""
        self._held.remove(number)
        _lock(self._board.descriptor, fcntl.LOCK_UN, number)

    def another_number(self) -> int:
        """One that nobody had, without a call to the system."""
        self._numbers += 1
        return self._seat << 56 | self._numbers

    def claim_room(self) -> str | None:
        """Room for one more that others may wait for, on behalf of the present asker; None if there is none."""
        source = asker.get()
        if self._taken >= _MOST or self._by_asker[source] >= _EACH:
            return None
        self._taken += 1
        self._by_asker[source] += 1
        return source

    def give_room(self, source: str) -> None:
        """Give it back."""
        self._taken -= 1
        self._by_asker[source] -= 1
        if not self._by_asker[source]:
            del self._by_asker[source]

    def put(self, body: bytes) -> int:
        """Lay a thing into the memory; where it lies. The oldest make room for it."""
        if self._bodies + len(body) > BODIES:
            self._bodies = 0
        at = self._board.bodies + self._seat * BODIES + self._bodies
        self._bodies += len(body)
        self._board.memory[at : at + len(body)] = body
        return at

    def free_file(self) -> int | None:
        """A place on the board where is said how far a file of ours is; None if all are taken."""
        return self._free_files.pop() if self._free_files else None

    def give_file(self, place: int) -> None:
        """Give it back."""
        self._free_files.append(place)


class Watched:
    """Those of one worker who wait for news of a row."""

    def __init__(self) -> None:
        self.by = 0
        #: Set at the next news; to be got before one looks, and waited for behind that.
        self.news = asyncio.Event()

    def tell(self) -> None:
        """Let them look again."""
        news, self.news = self.news, asyncio.Event()
        news.set()


async def moment(news: asyncio.Event) -> None:
    """Wait for news, though not for long: nobody tells of a worker that was killed."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_LOOK):
            await news.wait()


@dataclass(frozen=True, slots=True)
class Lasting:
    """For how long the end of a flight holds for those who come later: while `mark` is what it was."""

    mark: Callable[[], int]
    seconds: Callable[[NarsealError], float]


class Flight:
    """The bringing of one thing, as one who asks for it sees it."""

    __slots__ = ("_board", "_number", "_room", "_shared", "key", "row")

    def __init__(self, shared: SharedFlights, board: Board, key: bytes) -> None:
        self._shared = shared
        self._board = board
        self.key = key
        self._number = int.from_bytes(key[:8], "little") >> 2  # an offset in a file
        self.row = self._number % ROWS
        self._room: str | None = None

    @property
    def ends(self) -> int:
        """Another number than before means: it may have ended meanwhile."""
        return self._board.cells[self.row]

    def begin(self) -> bool:
        """Whether the thing is ours to bring, since nobody else does. `end` is to follow.

        Where there is no room, it is brought without that others wait for it.
        """
        try:
            if not self._shared.take(self._number):
                return False
        except OSError:  # the kernel has no room for a lock
            return True
        self._room = self._shared.claim_room()
        if self._room is None:
            self._shared.give(self._number)
        return True

    def end(self) -> None:
        """It is brought, or was given up."""
        if self._room is None:
            return
        self._shared.give_room(self._room)
        self._room = None
        self._board.cells[self.row] = self._shared.another_number()
        self._shared.give(self._number)
        self._shared.ring(self.row)

    @property
    def holder(self) -> int:
        """The process of the worker that brings it; 0 if none does."""
        if self._shared.has(self._number):
            return os.getpid()
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, self._number, 1, 0)
        answer = fcntl.fcntl(self._board.descriptor, fcntl.F_GETLK, asked)
        kind, *_, process = _FLOCK.unpack(answer)
        return 0 if kind == fcntl.F_UNLCK else int(process)

    @property
    def is_stuck(self) -> bool:
        """Whether the worker that brings it does nothing any more: it was stopped, or hangs."""
        holder = self.holder
        return bool(holder) and self._board.silence(holder) > _SILENT

    async def over(self, deadline: float) -> None:
        """Wait until no other worker brings it, or it is stuck, or until then (monotonic)."""
        with self.watching() as watched:
            news = watched.news
            while self.holder and not self.is_stuck and monotonic() < deadline:
                await moment(news)
                news = watched.news

    def watching(self) -> AbstractContextManager[Watched]:
        """Hear news of it within."""
        return self._shared.watching(self.row)

    async def telling(self, bring: Callable[[], Awaitable[T]], lasting: Lasting) -> T:
        """What `bring` brings; if it raises, those who wait are told."""
        mark = lasting.mark()
        try:
            return await bring()
        except NarsealError as error:
            self.tell(error, mark=mark, until=monotonic() + lasting.seconds(error))
            raise

    def tell(self, error: NarsealError, *, mark: int = 0, until: float = 0.0) -> None:
        """Say how it ended: to those who wait, and `until` then to others, while the mark is the same."""
        if (text := told(error, most=OUTCOME - _HEAD.size)) is None:
            return
        said = _outcome(self.key, monotonic(), mark, until, text)
        at = self._outcome
        self._board.memory[at : at + len(said)] = said

    def check(self, began: float, lasting: Lasting | None = None) -> None:
        """Raise what it ended with since `began`, or before if that still holds."""
        at = self._outcome
        if self._board.memory[at : at + KEY] != self.key:
            return
        record = self._board.memory[at : at + OUTCOME]
        _, _, ended, mark, until, size = _HEAD.unpack_from(record)
        text = record[_HEAD.size : _HEAD.size + size]
        if not record.startswith(_outcome(self.key, ended, mark, until, text)):
            return  # somebody writes, or was killed then
        holds = lasting is not None and until > monotonic() and mark == lasting.mark()
        if (ended >= began or holds) and (error := heard(text)) is not None:
            raise error

    @property
    def _outcome(self) -> int:
        return self._board.outcomes + self.row * OUTCOME

    def show(self, name: str) -> Progress | None:
        """Say how far a file is in which the thing comes; None if there is no room to. To be ended."""
        if self._room is None or (place := self._shared.free_file()) is None:
            return None
        return Progress(self._shared, self, place, Place(self._board, place, self.key, name))

    def hand(self, body: bytes) -> Progress | None:
        """Give the thing itself, which is small, to those who wait for it; None if nobody does. To be ended."""
        if not self._shared.is_watched(self.row):
            return None
        at = self._shared.put(body)
        progress = self.show(f"@{at}-{body_digest(body, self.key)}")
        if progress:
            progress.advance(len(body), len(body), is_whole=True)
        return progress

    async def handed(self, *, patience: float) -> bytes | None:
        """The thing itself, from the worker that brings it; None if that has ended, or brings it in a file.

        TimeoutError after so many seconds.
        """
        deadline = monotonic() + patience
        with self.watching() as watched:
            while self.holder:
                news = watched.news
                if monotonic() > deadline or self.is_stuck:
                    raise TimeoutError
                if shown := self.shown():
                    if not shown.is_body:
                        return None
                    if (body := shown.body(self.key)) is not None:
                        return body
                await moment(news)
        return None

    def shown(self) -> Shown | None:
        """The file in which another worker brings it, if it says so."""
        holder = self.holder
        return Shown.of(self._board, self.key, holder) if holder else None


class Progress:
    """How far a file is that we bring, for other workers to see."""

    def __init__(self, shared: SharedFlights, flight: Flight, number: int, place: Place) -> None:
        self._shared = shared
        self._row = flight.row
        self._number = number
        self._place = place

    def advance(self, size: int, released: int, *, is_whole: bool = False) -> None:
        """So much of so much may be read; `is_whole`: and it was verified. In any thread."""
        self._place.say(size, released, is_whole=is_whole)
        self._shared.ring(self._row)

    @property
    def is_watched(self) -> bool:
        """Whether somebody reads it in another worker."""
        return self._shared.is_watched(self._row)

    def end(self) -> None:
        """Say nothing any more."""
        self._place.end()
        self._shared.give_file(self._number)


def _outcome(key: bytes, ended: float, mark: int, until: float, text: bytes) -> bytes:
    """What is said of the end of a flight, with a check sum."""
    bare = _HEAD.pack(key, bytes(8), ended, mark, until, len(text)) + text
    check = hashlib.blake2b(bare, digest_size=8).digest()
    return bare[:KEY] + check + bare[KEY + 8 :]


def _lock(descriptor: int, kind: int, number: int) -> bool:
    """Whether it could be done."""
    try:
        fcntl.lockf(descriptor, kind, 1, number)
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: somebody else has it
        return False
    return True

"""Connections of those who ask the signer: who they are, and how much of each may wait."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

from narseal.custody import wire
from narseal.errors import Malformed, Unavailable
from narseal.runtime.budget import Budget
from narseal.signer.rules import Peer

_log = logging.getLogger(__name__)
_CONNECTIONS = 64  # of each user
_WAITING = 1024  # requests of one connection on their way
_BYTES = (
    2 * wire.MAX_BYTES
)  # of one user's requests on their way, those that are not whole included
_PATIENCE = 60.0  # seconds for the rest of a frame that has begun, and for answers to be read


@dataclass(slots=True, eq=False)
class Frame:
    """What somebody sent, until all that is in it is answered."""

    body: bytes
    line: Line
    #: By the monotonic clock, in seconds.
    at: float
    #: How many requests it counts for, before anybody read it.
    weight: int
    #: Requests in it that are not answered.
    left: int = 1


class Lines:
    """All connections. Each user has room of his own: nobody's requests keep another's out."""

    def __init__(self, users: Collection[int], take: Callable[[Frame], None]) -> None:
        """`take` gets each frame, in the order in which they came."""
        self.take = take
        self._users = frozenset(users)
        self._open: set[Line] = set()
        self._room = Budget(_BYTES * len(self._users), each=_BYTES)
        #: Those that wait for room, in the order in which they asked.
        self._waiting: dict[Line, None] = {}

    def connect(self) -> Line:
        """What a new connection is served by."""
        return Line(self)

    def admit(self, line: Line) -> bool:
        """Whether a connection is served."""
        uid = line.peer.uid
        if uid not in self._users or self._count(uid) >= _CONNECTIONS:
            return False
        self._open.add(line)
        return True

    def leave(self, line: Line) -> None:
        """A connection has ended."""
        self._open.discard(line)
        self._waiting.pop(line, None)

    def find_room(self, line: Line, size: int) -> bool:
        """Room for so many bytes of a user's; who finds none is told to go on when there may be."""
        try:
            self._room.take(str(line.peer.uid), size)
        except Unavailable:
            self._waiting[line] = None
            return False
        return True

    def give_back(self, peer: Peer, size: int) -> None:
        """Bytes that wait no more."""
        self._room.give_back(str(peer.uid), size)
        waiting, self._waiting = self._waiting, {}
        for line in waiting:
            line.go_on()

    def close(self) -> None:
        """End all of them."""
        for line in list(self._open):
            line.close()

    def _count(self, uid: int) -> int:
        return sum(line.peer.uid == uid for line in self._open)


class Line(asyncio.Protocol):
    """A connection of one who may ask.

    It is read only while there is room for what comes, and while what is answered is read.
    """

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._frames = wire.Frames(self._begin)
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._begun = 0  # bytes of the frame that is not whole
        self._waiting = 0
        self._has_room = True
        self._is_heard = True
        self._takes_several = False
        self.peer = Peer(-1, -1)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Serve it, if it may ask."""
        self.peer = _peer(transport.get_extra_info("socket"))
        self._transport = cast("asyncio.Transport", transport)  # uvloop has its own
        if not self._lines.admit(self):
            who = {"uid": self.peer.uid, "pid": self.peer.pid}
            _log.warning("turned away a connection", extra=who)
            self._transport.abort()
            self._transport = None

    def data_received(self, data: bytes) -> None:
        """Take what is whole and has room."""
        if self._transport is None or self._transport.is_closing():
            return
        self._has_room = True
        try:
            for body in self._frames.feed(data):
                self._take(body)
        except Malformed as error:
            _log.warning("a connection ends: %s", error, extra={"uid": self.peer.uid})
            self.close()
        else:
            self._pace()

    def connection_lost(self, exc: Exception | None) -> None:
        """What it asked for goes on, to be answered to nobody."""
        if self._transport is None:
            return
        self._transport = None
        self._lines.leave(self)
        self._stop_waiting()
        if self._frames.is_within:
            self._lines.give_back(self.peer, self._begun)

    def pause_writing(self) -> None:
        """It does not read its answers: it is not asked for more."""
        self._is_heard = False
        self._pace()

    def resume_writing(self) -> None:
        """It reads again."""
        self._is_heard = True
        self._stop_waiting()
        self.go_on()

    def go_on(self) -> None:
        """There may be room."""
        self.data_received(b"")

    def answer(self, answered: Sequence[tuple[Frame, dict[str, Any]]]) -> None:
        """Answer some of what was asked on this line."""
        if self._transport and not self._transport.is_closing():
            trees = [tree for _, tree in answered]
            each = wire.encode_several(trees, most=wire.MAX_SEVERAL if self._takes_several else 1)
            self._transport.write(each)
        was_served = self._is_served
        freed = 0
        for frame, _ in answered:
            frame.left -= 1
            if not frame.left:
                self._waiting -= frame.weight
                freed += len(frame.body)
        if freed:
            self._lines.give_back(self.peer, freed)
        if self._is_served and not was_served:
            self.go_on()

    def close(self) -> None:
        """End the connection."""
        if self._transport:
            self._transport.close()

    @property
    def _is_served(self) -> bool:
        return self._is_heard and self._waiting < _WAITING

    def _begin(self, size: int) -> bool:
        if not self._is_served or not self._lines.find_room(self, size):
            self._has_room = False
            return False
        self._begun = size
        self._stop_waiting()
        return True

    def _take(self, body: bytes) -> None:
        several = wire.has_several(body)
        self._takes_several |= several
        weight = wire.MAX_SEVERAL if several else 1
        self._waiting += weight
        self._lines.take(Frame(body, self, time.monotonic(), weight))

    def _pace(self) -> None:
        """Read, or do not; and wait for what the other side has to do, but not for ever."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        reads = self._has_room and self._is_served
        if reads and not transport.is_reading():
            transport.resume_reading()
        elif not reads and transport.is_reading():
            transport.pause_reading()
        waits = not self._is_heard or (reads and self._frames.is_within)
        if waits and self._deadline is None:
            self._deadline = asyncio.get_running_loop().call_later(_PATIENCE, self._give_up)
        elif not waits:
            self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        what = "the rest of a frame does not come" if self._is_heard else "it does not read"
        _log.warning("a connection ends: %s", what, extra={"uid": self.peer.uid})
        if self._transport:
            self._transport.abort()


def _peer(sock: socket.socket) -> Peer:
    """SO_PEERCRED."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return Peer(uid, pid)

"""Requests that arrive in the same instant are begun some at a time, one client's after another's.

The loop reads all connections that have something before it does anything else. A thousand requests
that came together would keep it for a fifth of a second; here a turn of the loop begins a few, and the
others wait as they came. What is answered from memory does not wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from narseal.server.bounded import BoundedProtocol

_log = logging.getLogger(__name__)

#: Requests, or pieces of heads, that a turn of the loop begins.
_TOGETHER = 32


class RequestQueue:
    """A worker's, for all of its connections."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._left = _TOGETHER
        self._is_used = False
        #: Those that wait, by their clients' addresses.
        self._waiting: dict[str, deque[BoundedProtocol]] = {}
        #: The one whose turn it is.
        self._next: BoundedProtocol | None = None

    def may_begin(self, connection: BoundedProtocol) -> bool:
        """Whether it is a connection's turn; if not, it is to be added."""
        if not self._is_used:
            self._is_used = True
            self._loop.call_soon(self._turn)
        if self._left and (not self._waiting or connection is self._next):
            self._left -= 1
            return True
        return False

    def add(self, address: str, connection: BoundedProtocol) -> None:
        """A connection holds what came, and is told to go on when it is its turn."""
        self._waiting.setdefault(address, deque()).append(connection)

    def _turn(self) -> None:
        """Let some of those that wait go on. One that fails ends, as it would if the loop had read it."""
        self._is_used = bool(self._waiting)
        if self._is_used:
            self._loop.call_soon(self._turn)
        self._left = _TOGETHER
        while self._waiting and self._left:
            address = next(iter(self._waiting))
            connections = self._waiting.pop(address)
            self._next = connection = connections.popleft()
            if connections:  # behind the other addresses
                self._waiting[address] = connections
            try:
                connection.go_on()
            except Exception:
                _log.exception("what came on a connection could not be read")
                connection.force_close()
        self._next = None

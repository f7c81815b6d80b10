"""Bodies of requests that came and that nobody has read yet, of all connections of a worker.

A read of a connection brings up to 256 KB, and many connections are read before the first handler
has its turn. What handlers take is held to their own budgets; this bounds what comes before.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

#: Bytes of all, and of each address.
_ALL = 48 << 20
_EACH = 36 << 20


class Connection(Protocol):
    """One that may hold unread bytes of bodies."""

    address: str

    def unread(self) -> int:
        """How many."""


class Unread:
    """Who holds unread bytes of bodies, and whether there is room for more."""

    def __init__(self) -> None:
        self._holding: set[Connection] = set()
        #: Bytes that are held at most: each connection is asked again only when these are too many.
        self._at_most = 0

    def has_room(self, connection: Connection, size: int) -> bool:
        """Whether so many more bytes of it may be kept."""
        self._at_most += size
        if self._at_most > _EACH:
            held = self._held()
            self._at_most = held.total() + size
            if self._at_most > _ALL or held[connection.address] + size > _EACH:
                self._at_most -= size
                return False
        self._holding.add(connection)
        return True

    def gone(self, connection: Connection) -> None:
        """It holds nothing any more."""
        self._holding.discard(connection)

    def _held(self) -> Counter[str]:
        """Bytes by address, of all that are held."""
        held: Counter[str] = Counter()
        for connection in list(self._holding):
            if size := connection.unread():
                held[connection.address] += size
            else:
                self._holding.discard(connection)
        return held

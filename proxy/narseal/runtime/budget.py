"""Memory that many hold together: each byte from outside that waits in it was counted first."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Self

from narseal.errors import Unavailable


class Budget:
    """So many bytes for all, and so many for each one who sends.

    Who finds no room is refused at once. Were he to wait, he would hold what he has so far, and all
    could wait for each other.
    """

    def __init__(self, most: int, *, each: int) -> None:
        self._most = most
        self._each = each
        self._taken = 0
        self._by_holder: Counter[str] = Counter()
        self._lock = threading.Lock()

    def claim(self, holder: str) -> Claim:
        """Room that grows, for one who sends."""
        return Claim(self, holder)

    def take(self, holder: str, size: int) -> None:
        """Unavailable if there is no room for more bytes."""
        with self._lock:
            mine = self._by_holder[holder] + size
            if self._taken + size > self._most or mine > self._each:
                raise Unavailable(
                    "too much is on its way through this worker's memory; ask again in a moment"
                )
            self._by_holder[holder] = mine
            self._taken += size

    def give_back(self, holder: str, size: int) -> None:
        """Let others have it."""
        with self._lock:
            self._taken -= size
            self._by_holder[holder] -= size
            if not self._by_holder[holder]:
                del self._by_holder[holder]


class Claim:
    """What somebody holds of a budget, until the context ends."""

    __slots__ = ("_budget", "_holder", "_size")

    def __init__(self, budget: Budget, holder: str) -> None:
        self._budget = budget
        self._holder = holder
        self._size = 0

    def take(self, size: int) -> None:
        """Room for more bytes; Unavailable if there is none."""
        if not size:
            return
        self._budget.take(self._holder, size)
        self._size += size

    def counting(self, write: Callable[[bytes], object]) -> Callable[[bytes], None]:
        """`write`, of bytes for which there is room."""

        def counted_write(data: bytes) -> None:
            self.take(len(data))
            write(data)

        return counted_write

    def release(self) -> None:
        """Let go of all of it."""
        size, self._size = self._size, 0
        if size:
            self._budget.give_back(self._holder, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


async def counted(chunks: AsyncIterator[bytes], claim: Claim) -> AsyncIterator[bytes]:
    """All of `chunks`, once there is room for them."""
    async for chunk in chunks:
        claim.take(len(chunk))
        yield chunk

"""A breaker: what failed several times in a row is left alone for a moment."""

from __future__ import annotations

_FAILURES = 5
_REST = 1.0


class Breaker:
    """Times are of a monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._failures = 0
        self._rests_until = 0.0

    def is_open(self, now: float) -> bool:
        """Whether to leave it alone now; after the rest one attempt is let through at a time."""
        if self._failures < _FAILURES:
            return False
        if now < self._rests_until:
            return True
        self._rests_until = now + _REST
        return False

    def good(self) -> None:
        """It answered."""
        self._failures = 0

    def bad(self, now: float) -> None:
        """It failed."""
        self._failures += 1
        if self._failures >= _FAILURES:
            self._rests_until = now + _REST

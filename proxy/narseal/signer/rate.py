"""How many signatures the operator lets out."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from narseal.errors import Unavailable


class Rate:
    """Signatures a second, and a day; 0: no bound."""

    def __init__(self, rate: int, per_day: int) -> None:
        self._rate = rate
        self._per_day = per_day
        self._left = float(rate)
        self._at = time.monotonic()
        self._day = ""
        self._today = 0

    def take(self, most: int) -> int:
        """How many may be made now, up to `most`; Unavailable if that is none for today."""
        now = time.monotonic()
        self._left = min(float(self._rate), self._left + (now - self._at) * self._rate)
        self._at = now
        day = datetime.now(UTC).date().isoformat()
        if day != self._day:
            self._day, self._today = day, 0
        count = most
        if self._per_day:
            count = min(count, self._per_day - self._today)
            if count <= 0:
                raise Unavailable(f"no more than {self._per_day} signatures today (per_day)")
        if self._rate:
            count = min(count, int(self._left))
        self._left -= count
        self._today += count
        return count

"""What one source may take of a worker: so many transfers at a time, and none that only drips."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from time import monotonic

from narseal.errors import NarsealError
from narseal.runtime.slots import FairSlots, Taken
from narseal.upstream import Upstream

#: What nobody reads any more has to come so many times faster.
_UNREAD = 64


class Slots:
    """Each upstream has its own, so that one that hangs holds up no other's; each asker half of them."""

    def __init__(self, each: int, *, least_rate: int) -> None:
        #: Bytes a second below which who has a slot loses it (`Pace`).
        self.least_rate = least_rate
        self._by_url: defaultdict[str, FairSlots] = defaultdict(lambda: FairSlots(each))

    def of(self, upstream: Upstream) -> Taken:
        """One of an upstream's; to be entered."""
        return self._by_url[upstream.config.url].taken()


class Pace:
    """Holds one connection to a least rate, in bytes a second, over each `window` of seconds."""

    def __init__(self, *, least: int, window: float, error: Callable[[str], NarsealError]) -> None:
        """`error` is raised of a sentence that says how slow it was."""
        self._least = least
        self._window = window
        self._error = error
        self._since: float | None = None
        self._last = 0.0
        self._bytes = 0

    def wait(self) -> None:
        """The next bytes are waited for from now on: what passed since the last ones was our doing."""
        if self._since is not None:
            self._since += monotonic() - self._last

    def took(self, count: int, *, is_read: bool = True) -> None:
        """So many bytes came; raises the error if that is too few by now."""
        self._last = monotonic()
        if self._since is None:  # what was passed over before is not counted
            self._since = self._last
        self._bytes += count
        elapsed = self._last - self._since
        if elapsed < self._window:
            return
        least = self._least * (1 if is_read else _UNREAD)
        if self._bytes < least * elapsed:
            raise self._error(
                f"{self._bytes} bytes in {elapsed:.0f} s; limits.least_rate asks for {least} a second"
            )
        self._since, self._bytes = self._last, 0

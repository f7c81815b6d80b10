"""What a worker keeps in memory: finished answers, and what nobody has. Both bounded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from narseal.errors import NarsealError
from narseal.storage import Epoch

_ENTRY_OVERHEAD = 400  # bytes that an entry costs beside its answer


@dataclass(frozen=True, slots=True)
class Hot:
    """The finished answer to a GET, but for its first lines."""

    route: str
    #: Header fields from behind `Date:` on, the empty line, the body.
    rest: bytes
    body_size: int

    @property
    def body(self) -> bytes:
        """The body alone."""
        return self.rest[len(self.rest) - self.body_size :]


class HotMap:
    """Finished answers by request target, least recently used out first.

    Everything is forgotten when the epoch changes, that is when any worker withdrew something.
    """

    def __init__(self, *, max_bytes: int, epoch: Epoch) -> None:
        self._max_bytes = max_bytes
        self._epoch = epoch
        self._cell = epoch.cell
        self._seen = epoch.read()
        self._bytes = 0
        self._suspended = False
        self._answers: OrderedDict[bytes, Hot] = OrderedDict()

    def get(self, target: bytes) -> Hot | None:
        """The answer for `/…`, if it is here and still good."""
        if self._cell[0] != self._seen:
            self._forget()
        answer = self._answers.get(target)
        if answer is not None:
            self._answers.move_to_end(target)
        return answer

    def mark(self) -> int:
        """Read this before an answer is made, and give it to `put`."""
        return self._epoch.read()

    def put(self, target: bytes, answer: Hot, mark: int) -> None:
        """Keep an answer, unless something was withdrawn since `mark`."""
        if self._epoch.read() != mark or self._suspended:
            return
        if mark != self._seen:
            self._forget()
        self.drop(target)
        self._answers[target] = answer
        self._bytes += len(answer.rest) + _ENTRY_OVERHEAD
        while self._bytes > self._max_bytes:
            _, old = self._answers.popitem(last=False)
            self._bytes -= len(old.rest) + _ENTRY_OVERHEAD

    def drop(self, target: bytes) -> None:
        """Forget one answer in this worker."""
        old = self._answers.pop(target, None)
        if old is not None:
            self._bytes -= len(old.rest) + _ENTRY_OVERHEAD

    def suspend(self) -> None:
        """Forget everything and keep nothing: what was revoked cannot be known."""
        self._suspended = True
        self._forget()

    def resume(self) -> None:
        """Keep answers again."""
        self._suspended = False

    def _forget(self) -> None:
        self._answers.clear()
        self._bytes = 0
        self._seen = self._epoch.read()


class Negatives:
    """Absences and refusals, for a time; the oldest go first, all when something arrives."""

    def __init__(
        self, *, ttl: float, entries: int, clock: Callable[[], float], epoch: Epoch
    ) -> None:
        self._ttl = ttl
        self._epoch = epoch
        self._seen = epoch.arrivals()
        self._entries = entries
        self._clock = clock
        self._known: OrderedDict[str, tuple[float, NarsealError]] = OrderedDict()

    def get(self, key: str) -> NarsealError | None:
        """Why the thing is not to be had, if that was found out lately."""
        if self._epoch.arrivals() != self._seen:
            self._known.clear()
            self._seen = self._epoch.arrivals()
        found = self._known.get(key)
        if found is None:
            return None
        if found[0] < self._clock():
            del self._known[key]
            return None
        return found[1].with_traceback(None)  # which grows with each raise, and keeps its frames

    def holds(self, key: str, error: NarsealError) -> bool:
        """Whether just this is remembered."""
        found = self._known.get(key)
        return found is not None and found[1] is error

    def put(self, key: str, error: NarsealError, arrivals: int) -> None:
        """Remember an absence or a refusal, never trouble, unless something arrived since `arrivals` was read."""
        if self._epoch.arrivals() != arrivals:
            return
        self._known.pop(key, None)
        error.__context__ = error.__cause__ = error.__traceback__ = None
        self._known[key] = (self._clock() + self._ttl, error)
        while len(self._known) > self._entries:
            self._known.popitem(last=False)

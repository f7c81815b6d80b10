"""Slots for what is bounded, shared out by who asks: whoever asks for much leaves room for others."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from itertools import islice
from time import monotonic

#: On whose behalf a task works: a client's address. Tasks that it starts inherit it.
asker: ContextVar[str] = ContextVar("asker", default="")


#: Seconds for which who asked counts as somebody beside others.
LATELY = 1.0
#: With so many of those who asked last an asker is compared.
_COMPARED = 16


class FairSlots:
    """A number of slots, of which one asker holds at most half.

    A slot that becomes free goes to the one who holds the fewest; among the same asker's, to who
    came first. Where slots stand for work of our own, what others ask for takes the longer the more
    of them are held: such slots are `levelled`, and nobody holds more than anybody else wants who asked
    lately. So who asks one thing after another waits for one of another's, and those who ask for much at
    a time do not slow each other down.
    """

    def __init__(
        self, count: int, *, levelled: bool = False, clock: Callable[[], float] = monotonic
    ) -> None:
        self._free = count
        self._most = max(1, count // 2)
        self._is_levelled = levelled
        self._clock = clock
        self._looking: asyncio.TimerHandle | None = None
        #: When each last asked, in that order, and how many slots it had and wanted then.
        self._asked: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._held: Counter[str] = Counter()
        #: Those who wait in each one's share; they are told in whose they have their slot.
        self._waiting: dict[str, deque[asyncio.Future[str]]] = {}

    def taken(self) -> Taken:
        """A slot of the present asker's: a context."""
        return Taken(self, asker.get())

    async def take(self, source: str, taken: Taken | None = None) -> str:
        """Wait for a slot; whose it is: to be given back."""
        if self._is_levelled:
            self._note(source)
        if self._free and self._may(source):
            self._grant(source)
            return source
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(source, deque()).append(future)
        if taken:
            taken.future = future
        self._look_later()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give(future.result())
            raise

    def move(self, future: asyncio.Future[str], source: str, to: str) -> bool:
        """Let what waits in one's share wait in another's, if its turn comes earlier there; whether it does."""
        queue = self._waiting.get(source)
        if source == to or queue is None or future not in queue:
            return False
        here = self._held[source] + queue.index(future)
        if self._held[to] + len(self._waiting.get(to, ())) >= here:
            return False
        queue.remove(future)
        if not queue:
            del self._waiting[source]
        self._waiting.setdefault(to, deque()).append(future)
        self._share_out()
        return True

    def give(self, source: str) -> None:
        """Give a slot back."""
        self._free += 1
        self._held[source] -= 1
        if not self._held[source]:
            del self._held[source]
        self._share_out()

    def _look_later(self) -> None:
        """Who waits because others asked may have a slot when that is long ago."""
        if self._is_levelled and self._waiting and self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(LATELY * 1.1, self._look)

    def _look(self) -> None:
        self._looking = None
        self._share_out()
        self._look_later()

    def _share_out(self) -> None:
        while self._free and (next_ := self._next()) is not None:
            queue = self._waiting[next_]
            future = queue.popleft()
            if not queue:
                del self._waiting[next_]
            if not future.cancelled():
                self._grant(next_)
                future.set_result(next_)

    def _grant(self, source: str) -> None:
        self._free -= 1
        self._held[source] += 1

    def _note(self, source: str) -> None:
        now = self._clock()
        wants = self._held[source] + len(self._waiting.get(source, ())) + 1
        self._asked[source] = now, wants
        self._asked.move_to_end(source)
        while next(iter(self._asked.values()))[0] < now - LATELY:
            self._asked.popitem(last=False)

    def _may(self, source: str) -> bool:
        """Whether an asker may have one more."""
        held = self._held[source]
        if not held or held >= self._most or not self._is_levelled:
            return held < self._most
        since = self._clock() - LATELY
        for who, (at, wants) in islice(reversed(self._asked.items()), _COMPARED):
            if who != source and at >= since and held >= wants:
                return False
        return True

    def _next(self) -> str | None:
        """Who gets the next slot; None: nobody who waits may have another."""
        may = [source for source in self._waiting if self._may(source)]
        return min(may, key=lambda source: self._held[source], default=None)


class Taken(AbstractAsyncContextManager[None]):
    """A slot that is taken within; a class, since a generator costs as much as what is done with the slot."""

    __slots__ = ("_slots", "_source", "future")

    def __init__(self, slots: FairSlots, source: str) -> None:
        self._slots = slots
        self._source = source
        #: What is waited for.
        self.future: asyncio.Future[str] | None = None

    def wanted_by(self, source: str) -> None:
        """Somebody else wants what this is for: it may wait in his share."""
        if self.future and self._slots.move(self.future, self._source, source):
            self._source = source

    async def __aenter__(self) -> None:
        self._source = await self._slots.take(self._source, self)

    async def __aexit__(self, *_: object) -> None:
        self._slots.give(self._source)


class Turn(AbstractAsyncContextManager[None]):
    """A slot that a piece of work has, and gives up within: while it waits for somebody else."""

    def __init__(self, slots: FairSlots, source: str) -> None:
        self._slots = slots
        self._source = source
        self._has_slot = False
        #: One of its tasks waits for the slot: no other has to.
        self._is_waiting = False
        self._away = 0
        #: Its work has ended, or was given up.
        self.is_over = False

    @classmethod
    async def begin(cls, slots: FairSlots) -> Turn | None:
        """Wait for a slot; None within work that has its turn. To be ended, by `work` or `end`."""
        present = _turn.get()
        if present and not present.is_over:
            return None
        turn = cls(slots, asker.get())
        await turn._take()
        return turn

    @contextmanager
    def work(self) -> Iterator[None]:
        """What is done within, and what that starts, has this turn; it ends then."""
        token = _turn.set(self)
        try:
            yield
        finally:
            _turn.reset(token)
            self.end()

    def end(self) -> None:
        """Give the slot back for good."""
        self.is_over = True
        self._give()

    async def _take(self) -> None:
        self._is_waiting = True
        try:
            await self._slots.take(self._source)
        finally:
            self._is_waiting = False
        self._has_slot = True
        if self.is_over or self._away:  # by now
            self._give()

    def _give(self) -> None:
        if self._has_slot:
            self._has_slot = False
            self._slots.give(self._source)

    async def __aenter__(self) -> None:
        self._away += 1
        self._give()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            self._away -= 1  # who is cancelled waits for nothing; what goes on has no slot then
        else:
            await self._come_back()

    async def _come_back(self) -> None:
        self._away -= 1
        if not (self._away or self.is_over or self._has_slot or self._is_waiting):
            await self._take()


_NOTHING = nullcontext()
_turn: ContextVar[Turn | None] = ContextVar("turn", default=None)


@contextmanager
def apart() -> Iterator[None]:
    """Work that is started within has a turn of its own."""
    token = _turn.set(None)
    try:
        yield
    finally:
        _turn.reset(token)


def aside() -> AbstractAsyncContextManager[object]:
    """Give the present work's turn up, if it has one, while somebody else is waited for."""
    return _turn.get() or _NOTHING

"""What is brought in advance, since whoever asks for a path asks for what it refers to next, and then for the NARs.

Nix asks one thing after another, and each answer comes from far away. Nothing is brought for who only looks (HEAD), and
no NAR before a client fetches one. What nobody asks for in the end is counted, and bounded.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import islice
from time import monotonic

from narseal.errors import NarsealError
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.nars.small import is_small
from narseal.pipeline.services import Services
from narseal.runtime.slots import apart, asker
from narseal.storage import NarRecord
from narseal.telemetry import metrics
from narseal.telemetry.logs import request_id

_log = logging.getLogger(__name__)

#: Paths that one question may have brought, however deep they refer to each other; of one path's references, so many
#: are looked at.
MOST = 1000
#: Paths, or NARs, that are asked for at the same time.
_AT_A_TIME = 32
#: Paths that wait for that.
_UNDER_WAY = 4096
#: Paths that were only looked at, and may be asked for.
_LOOKED_AT = 4096
#: Narinfos, and NARs, that were brought and that nobody asked for yet: with so many no more are brought, until some
#: were asked for or forgotten, after so many seconds.
_UNUSED = 10_000
_UNUSED_NARS = 2_000
_FORGOTTEN = 600.0
#: Clients of whom it is known what they asked for last, and NARs of each.
_CLIENTS = 256
_NARS = 4096
#: The asker of all that is brought in advance: together it has one client's share.
_IN_ADVANCE = "in advance"


@dataclass(slots=True)
class _Question:
    """What may still be brought on its behalf, and what was."""

    left: int
    seen: set[str] = field(default_factory=set)
    waiting: deque[str] = field(default_factory=deque)


_question: ContextVar[_Question | None] = ContextVar("question", default=None)


@contextmanager
def question() -> Iterator[None]:
    """A client's question, on whose behalf paths may be brought; so what is found within begins."""
    token = _question.set(_Question(MOST))
    try:
        yield
    finally:
        _question.reset(token)


class _Brought:
    """What is brought of one kind, and of that what nobody asked for so far."""

    def __init__(self, kind: str, most: int) -> None:
        self._most = most
        self._count = metrics.prefetched.labels(kind)
        self._count_used = metrics.prefetch_used.labels(kind)
        #: On its way; whether a client asked for it meanwhile.
        self.under_way: dict[str, bool] = {}
        self._unused: OrderedDict[str, float] = OrderedDict()  # since when

    @contextmanager
    def coming(self, key: str) -> Iterator[Callable[[], None]]:
        """It is on its way within; to be called when it came."""
        self.under_way[key] = False

        def came() -> None:
            self._count.inc()
            if self.under_way[key]:
                self._count_used.inc()
            else:
                self._unused[key] = monotonic()

        try:
            yield came
        finally:
            del self.under_way[key]

    def asked(self, key: str) -> None:
        """A client asks for it."""
        if key in self.under_way:
            self.under_way[key] = True
        elif self._unused.pop(key, None) is not None:
            self._count_used.inc()

    def is_full(self, waiting: int = 0) -> bool:
        """Whether so much was brought in vain, is on its way or waits for that, that no more is."""
        while self._unused and next(iter(self._unused.values())) < monotonic() - _FORGOTTEN:
            self._unused.popitem(last=False)
        coming = len(self.under_way) + waiting
        return len(self._unused) + coming >= self._most or coming >= _UNDER_WAY


class References:
    """Brings the narinfos to which a path refers, and theirs after them.

    Where content comes first, that takes their NARs.
    """

    def __init__(
        self,
        services: Services,
        bring: Callable[[str], Awaitable[object]],
        is_asked: Callable[[str], bool],
    ) -> None:
        """`bring` admits the path of a hash part; `is_asked`: whether somebody is doing that."""
        self._index = services.index
        self._tasks = services.tasks
        self._bring = bring
        self._is_asked = is_asked
        #: What is to be brought; the questions on whose behalf, which have turns; and how many tasks do that.
        self._waiting: set[str] = set()
        self._questions: deque[_Question] = deque()
        self._bringing = 0
        self._brought = _Brought("narinfo", _UNUSED)
        #: What was admitted for who only looked: Nix begins so with a path that it wants.
        self._looked_at: OrderedDict[str, None] = OrderedDict()
        #: Nothing is brought, or no more.
        self.is_off = services.config.prefetch == "off" or not services.upstreams

    def asked(self, hash_part: str) -> None:
        """A client asks for a narinfo."""
        self._brought.asked(hash_part)

    def found(self, info: NarInfo) -> None:
        """The present question has its answer: what it refers to is brought if that was not done before."""
        if info.store_path.hash_part in self._looked_at:
            self.of(info)

    def of(self, info: NarInfo) -> None:
        """Bring what a path refers to, on behalf of the present question, if it is one."""
        asks = _question.get()
        if self.is_off:
            return
        if asks is None:
            self._looked_at[info.store_path.hash_part] = None
            if len(self._looked_at) > _LOOKED_AT:
                self._looked_at.popitem(last=False)
            return
        self._looked_at.pop(info.store_path.hash_part, None)
        for hash_part in islice(info.references.hash_parts(), MOST):
            if hash_part in asks.seen or hash_part == info.store_path.hash_part:
                continue
            if hash_part in self._waiting or hash_part in self._brought.under_way:
                continue
            if not asks.left or self._brought.is_full(len(self._waiting)):
                metrics.prefetch_stopped.inc()
                _log.debug("%s: no more of its references in advance", info.store_path)
                break
            asks.left -= 1
            asks.seen.add(hash_part)
            self._waiting.add(hash_part)
            if not asks.waiting:
                self._questions.append(asks)
            asks.waiting.append(hash_part)
        with apart():
            for _ in range(min(_AT_A_TIME - self._bringing, len(self._waiting))):
                self._bringing += 1
                self._tasks.start(self._bring_some(), "narinfos in advance")

    async def _bring_some(self) -> None:
        asker.set(_IN_ADVANCE)
        request_id.set(None)  # it goes on for others than the one for whom it was begun
        try:
            while self._questions and not self.is_off:
                asks = self._questions.popleft()
                hash_part = asks.waiting.popleft()
                if asks.waiting:
                    self._questions.append(asks)
                self._waiting.remove(hash_part)
                _question.set(asks)
                await self._take(hash_part)
        finally:
            self._bringing -= 1

    async def _take(self, hash_part: str) -> None:
        with self._brought.coming(hash_part) as came:
            try:
                if self._is_asked(hash_part) or await self._index.path(hash_part):
                    return
                await self._bring(hash_part)
            except NarsealError as error:
                _log.debug("%s is not brought in advance: %s", hash_part, error)
            except Exception:  # the others are brought whatever became of this one
                _log.exception("%s is not brought in advance", hash_part)
            else:
                came()


class NarsInAdvance:
    """Brings the small NARs of the narinfos that a client asked for, once it begins to fetch NARs.

    Of narinfos that were in memory, nobody knows who asked for them.
    """

    def __init__(self, services: Services, bring: Callable[[str], Awaitable[bool]]) -> None:
        """`bring` fetches a file if it is small and not stored; whether it did."""
        self._tasks = services.tasks
        self._bring = bring
        self._brought = _Brought("nar", _UNUSED_NARS)
        #: By client, the files of narinfos that it asked for last, and has not fetched.
        self._wanted: OrderedDict[str, dict[str, None]] = OrderedDict()
        self._bringing: set[str] = set()
        #: Nothing is brought, or no more.
        self.is_off = services.config.prefetch != "nars" or not services.upstreams

    def told(self, nar: NarRecord) -> None:
        """A client asked for a narinfo, which names a file."""
        if nar.stored or self.is_off or not is_small(nar):
            return
        client = asker.get()
        wanted = self._wanted.setdefault(client, {})
        self._wanted.move_to_end(client)
        wanted[nar.file] = None
        if len(wanted) > _NARS:
            del wanted[next(iter(wanted))]
        if len(self._wanted) > _CLIENTS:
            self._wanted.popitem(last=False)

    def asked(self, file: str) -> None:
        """A client fetches a NAR: it will want the others, too, whose narinfos it asked for."""
        self._brought.asked(file)
        client = asker.get()
        wanted = self._wanted.get(client)
        if wanted is None:
            return
        wanted.pop(file, None)
        if wanted and client not in self._bringing and not self.is_off:
            self._bringing.add(client)
            self._tasks.start(self._bring_all(client, wanted), "NARs in advance")

    async def _bring_all(self, client: str, wanted: dict[str, None]) -> None:
        asker.set(_IN_ADVANCE)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(_AT_A_TIME):
                    group.create_task(self._bring_some(wanted))
        finally:
            self._bringing.discard(client)

    async def _bring_some(self, wanted: dict[str, None]) -> None:
        while wanted and not self.is_off and not self._brought.is_full():
            file, _ = wanted.popitem()  # the last one first: Nix begins at what refers to nothing
            if file in self._brought.under_way:
                continue
            with self._brought.coming(file) as came:
                try:
                    if await self._bring(file):
                        came()
                except NarsealError as error:
                    _log.debug("nar/%s is not brought in advance: %s", file, error)

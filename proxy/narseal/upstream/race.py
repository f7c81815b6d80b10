"""Asking the upstreams, by priority, a slow one hedged by the next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Generic, TypeVar

from narseal.errors import (
    Denied,
    Malformed,
    NarsealError,
    NotFound,
    Refused,
    Trouble,
    UpstreamTrouble,
)
from narseal.telemetry import metrics
from narseal.telemetry.rejections import reject
from narseal.upstream.source import Upstream

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Answers:
    """What the upstreams said that was of no use, and what that means together."""

    def __init__(self) -> None:
        self._refused: Refused | Malformed | Denied | None = None
        self._trouble: Trouble | None = None

    def note(self, error: NarsealError, *, upstream: str, thing: str) -> None:
        """Take an error from one upstream; refusals are counted and logged here."""
        if isinstance(error, Refused | Malformed):
            reject(error, upstream=upstream, thing=thing)
            self._refused = self._refused or error
        elif isinstance(error, Denied):
            self._refused = error  # what was verified says more than what was not
        elif isinstance(error, Trouble):
            self._trouble = self._trouble or error
        elif not isinstance(error, NotFound):
            raise error

    def verdict(self, thing: str) -> NarsealError:
        """The error for the client: trouble outweighs refusal outweighs absence (I5)."""
        return self._trouble or self._refused or NotFound(f"no upstream has {thing}")


@asynccontextmanager
async def in_order(
    upstreams: Sequence[Upstream],
    question: Callable[[Upstream], Awaitable[T]],
    answers: Answers,
    *,
    thing: str,
) -> AsyncIterator[AsyncIterator[tuple[Upstream, T]]]:
    """Good answers to `question`, as they come; the errors go to `answers`.

    The upstreams are asked one after another, the next one when the one before has nothing or
    is slow. Leaving the context cancels what is still being asked.
    """
    race = _Race(upstreams, question)

    async def found() -> AsyncIterator[tuple[Upstream, T]]:
        while race.goes_on:
            for upstream, result in await race.results():
                if isinstance(result, NarsealError):
                    answers.note(result, upstream=upstream.config.url, thing=thing)
                else:
                    yield upstream, result

    try:
        yield found()
    finally:
        await race.end()


class _Race(Generic[T]):
    """Who is asked, and who still waits for it.

    While only one is asked, that is done in the caller's own task; a task is made for one who is asked beside
    another. If such a task has a good answer, the caller's question is given up, and is the next one to be
    asked, should the answer be of no use.
    """

    def __init__(
        self, upstreams: Sequence[Upstream], question: Callable[[Upstream], Awaitable[T]]
    ) -> None:
        self._question = question
        self._waiting = [*reversed(upstreams)]
        self._running: dict[asyncio.Task[T | NarsealError], Upstream] = {}
        self._late: asyncio.TimerHandle | None = None
        #: Of the question in the caller's task.
        self._given_up: asyncio.Timeout | None = None

    @property
    def goes_on(self) -> bool:
        """Whether there may be more results."""
        return bool(self._waiting or self._running)

    async def results(self) -> list[tuple[Upstream, T | NarsealError]]:
        """What there is, or comes next; nothing if somebody else is to be asked now."""
        if not self._running:
            return await self._here(self._waiting.pop())
        if not self._ended():
            newest = self._beside() if self._waiting else None
            await asyncio.wait(
                self._running,
                timeout=newest.config.hedge_after if newest and self._waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
        return [(self._running.pop(task), task.result()) for task in self._ended()]

    async def end(self) -> None:
        """Nobody is asked any more."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.gather(*self._running, return_exceptions=True)

    def _ended(self) -> list[asyncio.Task[T | NarsealError]]:
        return [task for task in self._running if task.done()]

    async def _here(self, upstream: Upstream) -> list[tuple[Upstream, T | NarsealError]]:
        """Ask in the caller's task. While that takes long, the next ones are asked beside it."""
        if not self._waiting:
            return [(upstream, await _timed(upstream, self._question))]
        self._hedge_after(upstream)
        try:
            async with asyncio.timeout(None) as given_up:
                self._given_up = given_up
                return [(upstream, await _timed(upstream, self._question))]
        except TimeoutError:  # by `_came`: a question's own are answers
            self._waiting.append(upstream)
            return []
        finally:
            self._given_up = None
            self._stop_hedging()

    def _beside(self) -> Upstream:
        """Ask the next one in a task."""
        upstream = self._waiting.pop()
        task = asyncio.create_task(_timed(upstream, self._question))
        self._running[task] = upstream
        task.add_done_callback(self._came)
        return upstream

    def _came(self, task: asyncio.Task[T | NarsealError]) -> None:
        """Somebody who is asked beside the caller's own question had something, or nothing."""
        if self._given_up is None:
            return
        if not (task.cancelled() or task.exception()) and isinstance(task.result(), NarsealError):
            self._hedge()
        else:
            self._given_up.reschedule(asyncio.get_running_loop().time())
            self._given_up = None

    def _hedge(self) -> None:
        self._stop_hedging()
        if self._waiting:
            self._hedge_after(self._beside())

    def _hedge_after(self, upstream: Upstream) -> None:
        if self._waiting:
            loop = asyncio.get_running_loop()
            self._late = loop.call_later(upstream.config.hedge_after, self._hedge)

    def _stop_hedging(self) -> None:
        if self._late:
            self._late.cancel()
            self._late = None


async def _timed(
    upstream: Upstream, question: Callable[[Upstream], Awaitable[T]]
) -> T | NarsealError:
    """The answer or the error as a value, so that one upstream's failure ends no other's task."""
    start = perf_counter()
    result = "trouble"
    try:
        answer = await question(upstream)
        result = "found"
        return answer
    except UpstreamTrouble as error:
        return error
    except NotFound as error:
        result = "absent"
        return error
    except NarsealError as error:
        result = "refused"
        return error
    except Exception as error:  # whatever an upstream sends, the next one is asked
        _log.exception("%s: a fault of ours", upstream.config.url)
        return UpstreamTrouble(f"{upstream.config.url}: {type(error).__name__}: {error}")
    finally:
        metrics.upstream_seconds.labels(upstream.config.label, result).observe(
            perf_counter() - start
        )

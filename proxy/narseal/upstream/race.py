"""Asking the upstreams, by priority, a slow one hedged by the next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from time import perf_counter
from typing import TypeVar

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
    running: dict[asyncio.Task[T | NarsealError], Upstream] = {}

    def ask(upstream: Upstream) -> None:
        running[asyncio.create_task(_timed(upstream, question))] = upstream

    async def found() -> AsyncIterator[tuple[Upstream, T]]:
        waiting = list(reversed(upstreams))
        while waiting or running:
            if waiting:
                ask(waiting.pop())
            newest = list(running.values())[-1]
            done, _ = await asyncio.wait(
                running,
                timeout=newest.config.hedge_after if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                upstream, result = running.pop(task), task.result()
                if isinstance(result, NarsealError):
                    answers.note(result, upstream=upstream.config.url, thing=thing)
                else:
                    yield upstream, result

    try:
        yield found()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


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

"""How an answer is found: remembered absence, one flight a key, and decided again at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from time import monotonic
from typing import Generic, TypeVar

from narseal.errors import (
    Denied,
    Malformed,
    NarsealError,
    NotFound,
    Refused,
    Unavailable,
    UpstreamTimeout,
)
from narseal.pipeline.caches import Negatives
from narseal.pipeline.services import Services
from narseal.runtime.shared_flights import Lasting
from narseal.runtime.single_flight import SingleFlight
from narseal.runtime.slots import Turn, aside
from narseal.telemetry import metrics

R = TypeVar("R")
_TRIES = 8


class Lookup(Generic[R]):
    """Answers of one kind, by key.

    Finding one takes time, in which keys may be revoked and paths withdrawn. So an answer only
    leaves if nothing was withdrawn since it was begun; else it is found again.

    Finding has its turn, of all that is found at the same time: who asks for much leaves room.
    """

    def __init__(
        self,
        services: Services,
        bring: Callable[[str], Awaitable[R]],
        *,
        look: Callable[[str], Awaitable[R | None]] | None = None,
        kind: str = "",
    ) -> None:
        """`look` finds what is here already, `bring` asks the upstreams.

        What has a `kind` is brought by one worker at a time: `look` must find it then in all of them.
        """
        limits = services.config.limits
        self._look = look
        self._bring = bring
        self._kind = kind
        self._shared = services.flights if kind else None
        self._ttl = limits.negative_ttl
        self._epoch = services.epoch
        self._hold = limits.content_hold
        self._turns = services.turns
        self._flights: SingleFlight[str, tuple[int, R]] = SingleFlight(
            services.tasks, on_joined=metrics.flights_joined.inc
        )
        self._negatives = Negatives(
            ttl=limits.negative_ttl,
            entries=limits.negative_entries,
            clock=monotonic,
            epoch=services.epoch,
        )

    async def get(self, key: str) -> R:
        """The answer, as it holds now.

        NotFound, Refused or Malformed (all 404), Denied (403) or Trouble (5xx), which is never
        remembered.
        """
        if (known := self._negatives.get(key)) is not None:
            raise known
        try:
            async with asyncio.timeout(self._hold):
                for _ in range(_TRIES):
                    mark, found = await self._ask(key)
                    if mark == self._epoch.read():
                        return found
        except TimeoutError as error:
            raise UpstreamTimeout(
                f"{key}: its NAR is still being fetched and verified; ask again"
            ) from error
        raise Unavailable(f"{key}: what may be served is changing; ask again")

    def is_under_way(self, key: str) -> bool:
        """Whether somebody is finding an answer."""
        return key in self._flights

    def remember(self, key: str, verdict: NarsealError, arrivals: int) -> None:
        """Remember that nobody has a thing, or why it is refused, for a time.

        Unless something arrived since the epoch's `arrivals` were these: it may have been this.
        """
        if isinstance(verdict, NotFound | Refused | Malformed | Denied):
            self._negatives.put(key, verdict, arrivals)

    async def _ask(self, key: str) -> tuple[int, R]:
        turn = None if key in self._flights else await Turn.begin(self._turns)
        if key not in self._flights:
            return await self._flights.join(key, lambda: self._fly(key, turn))
        if turn:  # somebody else's turn came first
            turn.end()
        async with aside():  # who waits for another's flight must not keep it from its turn
            return await self._flights.join(key, lambda: self._fly(key, None))

    async def _fly(self, key: str, turn: Turn | None) -> tuple[int, R]:
        with turn.work() if turn else nullcontext():
            mark = self._epoch.read()
            return mark, await self._find(key)

    async def _find(self, key: str) -> R:
        if self._look is None:
            return await self._bring(key)
        if self._shared is None:
            found = await self._look(key)
            return found if found is not None else await self._bring(key)

        def seconds(error: NarsealError) -> float:
            return self._ttl if self._negatives.holds(key, error) else 0.0

        return await self._shared.once(
            f"{self._kind} {key}",
            partial(self._look, key),
            partial(self._bring, key),
            Lasting(self._epoch.arrivals, seconds),
        )

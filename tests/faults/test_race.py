"""Asking upstreams by priority: who is asked when, in whose task, and what becomes of the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from narseal.config import UpstreamConfig
from narseal.errors import NotFound, UpstreamTrouble
from narseal.upstream import HttpUpstream, Upstream
from narseal.upstream.race import Answers, in_order
from tests.tools.narseal import UPSTREAM
from tests.tools.upstream import FakeCache, Gate, fake_cache
from tests.tools.waiting import PATIENCE

NAME = "x.narinfo"
NEVER = 86400.0  # seconds
#: Late at once.
HASTY = 0.0


class World:
    """Some caches, and who was asked in a task of its own."""

    def __init__(self, caches: list[FakeCache], upstreams: list[Upstream]) -> None:
        self.caches = caches
        self.upstreams = upstreams
        self.asked: list[str] = []
        self.in_own_task: list[str] = []
        self.answers = Answers()
        self._caller = asyncio.current_task()

    async def ask(self, upstream: Upstream) -> bytes:
        name = "abc"[self.upstreams.index(upstream)]
        self.asked.append(name)
        if asyncio.current_task() is not self._caller:
            self.in_own_task.append(name)
        data = await upstream.get(NAME, limit=1 << 20)
        if data is None:
            raise NotFound(f"{upstream.config.url} has none")
        return data

    async def all(self) -> list[bytes]:
        """What they have, in the order in which it comes."""
        async with in_order(self.upstreams, self.ask, self.answers, thing=NAME) as found:
            return [data async for _, data in found]

    async def first(self, count: int | None = None) -> bytes:
        """What comes first of the first `count` of them."""
        few = self.upstreams[:count]
        async with in_order(few, self.ask, self.answers, thing=NAME) as found:
            async for _, data in found:
                return data
        raise self.answers.verdict(NAME)


@asynccontextmanager
async def world(*hedge_after: float) -> AsyncIterator[World]:
    """As many upstreams, late after so many seconds each. None has anything at first."""
    async with fake_cache() as a, fake_cache() as b, fake_cache() as c, asyncio.timeout(PATIENCE):
        upstreams = [
            HttpUpstream(
                UpstreamConfig(url=cache.url, public_keys=(UPSTREAM.public,), hedge_after=after),
                lookups=8,
            )
            for cache, after in zip((a, b, c), hedge_after, strict=False)
        ]
        try:
            yield World([a, b, c], [*upstreams])
        finally:
            for upstream in upstreams:
                await upstream.close()


async def test_nobody_gets_a_task_while_nobody_is_late() -> None:
    async with world(NEVER, NEVER, NEVER) as w:
        for at in (2, 1, 0):
            w.asked.clear()
            w.caches[at].files[NAME] = b"%d" % at
            assert await w.first() == b"%d" % at
            assert "".join(w.asked) == "abc"[: at + 1]
        assert w.in_own_task == []


async def test_an_only_upstream_never_gets_a_task() -> None:
    async with world(HASTY) as w:
        gate = Gate()
        w.caches[0].files[NAME] = b"a"
        w.caches[0].fault(NAME, gate)
        asyncio.get_running_loop().call_later(0.01, gate.open)
        assert await w.first() == b"a"
        assert (w.asked, w.in_own_task) == (["a"], [])


async def test_who_is_late_is_hedged_and_may_still_be_first() -> None:
    async with world(HASTY, NEVER) as w:
        first, second = Gate(), Gate()
        for cache, gate in zip(w.caches, (first, second), strict=False):
            cache.files[NAME] = cache.url.encode()
            cache.fault(NAME, gate)

        async def let_go() -> None:
            await second.reached.wait()
            first.open()

        helper = asyncio.create_task(let_go())
        assert await w.first() == w.caches[0].url.encode()
        assert (w.asked, w.in_own_task) == (["a", "b"], ["b"])
        await helper


async def test_who_hangs_is_passed_over() -> None:
    async with world(HASTY, HASTY, NEVER) as w:
        for cache in w.caches[:2]:
            cache.fault(NAME, Gate())
        w.caches[2].files[NAME] = b"c"
        assert await w.first() == b"c"
        assert (w.asked, w.in_own_task) == (["a", "b", "c"], ["b", "c"])
        # whose connection waited for an answer does not get it with the next question
        w.caches[0].files[NAME] = b"a"
        w.asked.clear()
        assert await w.first(1) == b"a"


async def test_who_hangs_is_not_waited_for_when_the_next_has_nothing() -> None:
    """The one after that is asked at once, though nobody else is late."""
    async with world(HASTY, NEVER, NEVER) as w:
        w.caches[0].fault(NAME, Gate())
        w.caches[2].files[NAME] = b"c"
        assert await w.first() == b"c"
        assert w.asked == ["a", "b", "c"]


async def test_what_was_given_up_is_asked_again_if_the_rest_is_of_no_use() -> None:
    async with world(HASTY, NEVER) as w:
        w.caches[0].files[NAME] = b"a"
        w.caches[0].fault(NAME, Gate())  # the first time it hangs
        w.caches[1].files[NAME] = b"b"
        assert await w.all() == [b"b", b"a"]
        assert w.asked == ["a", "b", "a"]


async def test_all_answers_come_once() -> None:
    async with world(NEVER, NEVER, NEVER) as w:
        for cache in w.caches:
            cache.files[NAME] = cache.url.encode()
        found = await w.all()
        assert found == [cache.url.encode() for cache in w.caches]
        assert w.asked == ["a", "b", "c"]


async def test_trouble_of_the_late_one_counts_when_the_rest_has_nothing() -> None:
    async with world(HASTY, HASTY, NEVER) as w:
        trouble, last = Gate(), Gate()

        async def fault(request: web.Request) -> web.StreamResponse:
            await trouble(request)
            return web.Response(status=503)

        w.caches[0].fault(NAME, fault)
        w.caches[2].fault(NAME, last)
        asking = asyncio.create_task(w.first())
        await last.reached.wait()
        last.open()
        trouble.open()
        with pytest.raises(UpstreamTrouble, match="503"):
            await asking
        assert w.asked == ["a", "b", "c"]


async def test_a_caller_who_leaves_ends_all_questions() -> None:
    async with world(HASTY, HASTY, HASTY) as w:
        gates = [Gate(), Gate(), Gate()]
        for cache, gate in zip(w.caches, gates, strict=True):
            cache.fault(NAME, gate)
        before = asyncio.all_tasks()
        asking = asyncio.create_task(w.first())
        for gate in gates:
            await gate.reached.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        ours = [task for task in asyncio.all_tasks() - before if "_timed" in repr(task)]
        assert ours == []

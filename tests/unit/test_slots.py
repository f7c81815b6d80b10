"""Slots that are shared out by who asks."""

from __future__ import annotations

import asyncio
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from narseal.runtime.slots import LATELY, FairSlots, Taken, Turn, aside, asker
from tests.tools.waiting import PATIENCE


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@given(
    count=st.integers(1, 9),
    steps=st.lists(
        st.tuples(st.sampled_from(["ask", "give", "leave"]), st.sampled_from("abc")), max_size=60
    ),
)
def test_nobody_has_more_than_half_and_no_slot_is_lost(
    count: int, steps: list[tuple[str, str]]
) -> None:
    async def run() -> None:
        slots = FairSlots(count)
        most = max(1, count // 2)
        asking: dict[str, list[asyncio.Task[str]]] = {"a": [], "b": [], "c": []}
        for step, who in steps:
            mine = asking[who]
            if step == "ask":
                mine.append(asyncio.create_task(slots.take(who)))
            elif step == "give" and (done := [task for task in mine if task.done()]):
                mine.remove(done[0])
                slots.give(who)
            elif step == "leave" and mine:  # whether it waits, or has just been given one
                task = mine.pop()
                if task.done():
                    slots.give(who)
                task.cancel()
            await _settle()
            held = Counter({who: sum(task.done() for task in asking[who]) for who in asking})
            waits = {who for who in asking if any(not task.done() for task in asking[who])}
            assert held.total() <= count
            assert max(held.values()) <= most
            if held.total() < count:  # whoever waits has his half
                assert all(held[who] == most for who in waits)
        for who, tasks in asking.items():
            for task in tasks:
                if task.done():
                    slots.give(who)
                task.cancel()
        await _settle()
        for who in ("x", "y")[:count]:
            for _ in range(most):
                async with asyncio.timeout(10):
                    await slots.take(who)

    asyncio.run(run())


async def test_who_has_the_fewest_is_next() -> None:
    slots = FairSlots(4)
    for who in ("a", "a", "b", "b"):
        await slots.take(who)
    order: list[str] = []

    async def ask(who: str) -> None:
        await slots.take(who)
        order.append(who)

    tasks = [asyncio.create_task(ask(who)) for who in ("a", "a", "c", "d")]
    await _settle()
    for who in ("a", "b"):
        slots.give(who)
        await _settle()
    assert order == ["c", "d"]
    slots.give("a")
    await _settle()
    assert order == ["c", "d", "a"]
    for task in tasks:
        task.cancel()


async def test_nobody_has_more_than_another_wants() -> None:
    now = 100.0
    slots = FairSlots(12, levelled=True, clock=lambda: now)
    tasks = [asyncio.create_task(slots.take("greedy")) for _ in range(40)]
    given = 0

    async def held_after(*, giving: int) -> int:
        nonlocal given
        for _ in range(giving):
            slots.give("greedy")
        given += giving
        await _settle()
        return len([task for task in tasks if task.done()]) - given

    assert await held_after(giving=0) == 6  # half: nobody else is there
    await slots.take("modest")
    assert await held_after(giving=5) == 1  # none of those is taken again
    assert await held_after(giving=1) == 1
    slots.give("modest")
    assert await held_after(giving=1) == 1  # who asked a moment ago may ask again
    others = [asyncio.create_task(slots.take("modest")) for _ in range(4)]
    await _settle()
    assert await held_after(giving=1) == 4  # it wants as much itself
    for task in others:
        task.cancel()
        if task.done():
            slots.give("modest")
    now += LATELY * 2
    await asyncio.sleep(LATELY * 1.5)  # it is noticed though nobody gives any back
    assert await held_after(giving=0) == 6
    for task in tasks:
        task.cancel()


async def test_a_cancelled_task_that_was_just_given_a_slot_gives_it_back() -> None:
    slots = FairSlots(1)
    await slots.take("a")
    task = asyncio.create_task(slots.take("a"))
    await _settle()
    slots.give("a")  # to the task, which has not run since
    task.cancel()
    await _settle()
    async with asyncio.timeout(10):
        await slots.take("a")


async def test_who_waits_for_somebody_else_has_no_slot_meanwhile() -> None:
    slots = FairSlots(2)  # one for each asker
    asker.set("a")
    let_go = asyncio.Event()
    seen: list[str] = []

    async def first(turn: Turn) -> None:
        with turn.work():
            assert await Turn.begin(slots) is None  # it has one
            async with aside():
                await let_go.wait()
            seen.append("back")

    turn = await Turn.begin(slots)
    assert turn
    task = asyncio.create_task(first(turn))
    await _settle()
    async with asyncio.timeout(10):
        second = await Turn.begin(slots)
    assert second
    let_go.set()
    await _settle()
    assert not seen  # the slot is the second one's
    second.end()
    async with asyncio.timeout(10):
        await task
        last = await Turn.begin(slots)
    assert last and seen == ["back"]


async def test_a_turn_that_ended_while_it_waited_for_its_slot_leaves_none_taken() -> None:
    slots = FairSlots(2)
    asker.set("a")
    turn = await Turn.begin(slots)
    assert turn
    let_go = asyncio.Event()

    async def wait() -> None:
        async with turn:
            await let_go.wait()

    back = asyncio.create_task(wait())
    await _settle()
    other = await Turn.begin(slots)
    assert other
    let_go.set()
    await _settle()
    turn.end()
    other.end()
    async with asyncio.timeout(10):
        await back
        assert await Turn.begin(slots)


@given(
    works=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=6),
    cancelled=st.sets(st.integers(0, 5)),
)
def test_no_turn_is_lost_whoever_of_its_work_waits_for_somebody(
    works: list[list[int]], cancelled: set[int]
) -> None:
    """Each piece of work asks several at once, as hedged upstreams are; for so many rounds each."""

    async def run() -> None:
        slots = FairSlots(4)
        asker.set("a")

        async def ask(rounds: int) -> None:
            async with aside():
                for _ in range(rounds):
                    await asyncio.sleep(0)

        async def work(rounds: list[int]) -> None:
            turn = await Turn.begin(slots)
            assert turn
            with turn.work():
                for _ in range(3):
                    async with asyncio.TaskGroup() as group:
                        for count in rounds:
                            group.create_task(ask(count))

        tasks = [asyncio.create_task(work(rounds)) for rounds in works]
        await _settle()
        for number in cancelled & set(range(len(tasks))):
            tasks[number].cancel()
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks, return_exceptions=True)
            for _ in range(2):
                await slots.take("a")
            for _ in range(2):
                await slots.take("b")

    asyncio.run(run())


async def test_who_is_cancelled_waits_for_no_slot() -> None:
    slots = FairSlots(2)
    asker.set("a")
    turn = await Turn.begin(slots)
    assert turn

    async def wait() -> None:
        async with turn:
            await asyncio.Event().wait()

    waiting = asyncio.create_task(wait())
    await _settle()
    assert await Turn.begin(slots)  # and it is never given back
    waiting.cancel()
    async with asyncio.timeout(10):
        await asyncio.gather(waiting, return_exceptions=True)


async def test_what_somebody_else_wants_too_waits_in_the_shorter_line() -> None:
    """In his share, and counted there; given back where it was taken, also by who is cancelled then."""
    slots = FairSlots(4)
    ended = [asyncio.Event() for _ in range(6)]
    begun: list[int] = []

    async def work(number: int, taken: Taken) -> None:
        async with taken:
            begun.append(number)
            await ended[number].wait()

    asker.set("greedy")
    taken = [slots.taken() for _ in ended]
    tasks = [asyncio.create_task(work(*pair)) for pair in enumerate(taken)]
    await _settle()
    assert begun == [0, 1]  # half of the slots
    taken[5].wanted_by("other")
    taken[5].wanted_by("third")  # whose line is no shorter
    await _settle()
    assert begun == [0, 1, 5]
    taken[0].wanted_by("other")  # it has its slot
    for number in (0, 5):
        ended[number].set()
    await _settle()
    assert begun == [0, 1, 5, 2]
    tasks[3].cancel()
    tasks[1].cancel()
    await _settle()
    assert begun == [0, 1, 5, 2, 4]
    for event in ended:
        event.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    for who in ("greedy", "greedy", "other", "other"):
        async with asyncio.timeout(PATIENCE):
            await slots.take(who)

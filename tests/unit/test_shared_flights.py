"""What workers share while they bring things: who has a flight, who waits, how it ended, how far a file is."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from narseal.errors import (
    Denied,
    Malformed,
    MalformedNar,
    NarsealError,
    NotFound,
    Refused,
    Unavailable,
    UpstreamTimeout,
    heard,
    told,
)
from narseal.runtime import board as board_room
from narseal.runtime import shared_flights
from narseal.runtime.board import Board, Shown
from narseal.runtime.shared_flights import Flight, Lasting, SharedFlights
from narseal.runtime.slots import asker
from tests.tools.waiting import PATIENCE, eventually

T = TypeVar("T")
# children that only lock and look
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
FORK = multiprocessing.get_context("fork")


def at(board: Board, seat: int, kin: int = 0) -> SharedFlights:
    return SharedFlights(board, seat, kin=kin, on_joined=lambda: None)


def elsewhere(work: Callable[[], T]) -> T:
    """What `work` returns in another process, which has ended by then."""
    here, there = FORK.Pipe()

    def run() -> None:
        async def main() -> T:
            return work()

        there.send(asyncio.run(main()))

    process = FORK.Process(target=run)
    process.start()
    result: T = here.recv()
    process.join()
    return result


async def test_nobody_is_not_stuck() -> None:
    """Seats that nobody took are of no process; nor is one that was left, whoever gets its number."""
    board = Board(3)
    shared = at(board, 0)
    assert not shared.flight("x").is_stuck
    assert board.seat_of(os.getpid()) == 0
    shared.close()
    assert board.seat_of(os.getpid()) is None


async def test_one_process_has_a_flight_until_it_ends() -> None:
    board = Board(2)
    ours = at(board, 0)
    flight, again = ours.flight("a"), ours.flight("a")

    def others() -> tuple[bool, bool, int]:
        theirs = at(board, 1)
        return theirs.flight("a").begin(), theirs.flight("b").begin(), theirs.flight("a").holder

    assert flight.begin() and not again.begin()
    assert again.holder == os.getpid()
    assert elsewhere(others) == (False, True, os.getpid())
    flight.end()
    assert flight.holder == 0
    assert elsewhere(others)[:2] == (True, True)
    assert flight.holder == 0, "the other one was killed with it"


async def test_those_of_another_configuration_wait_for_nobody() -> None:
    board = Board(2)
    assert at(board, 0, kin=1).flight("a").begin()
    assert elsewhere(lambda: at(board, 1, kin=2).flight("a").begin())


async def test_what_finds_no_room_is_brought_alone() -> None:
    """Of one asker, and of all: others' flights are shared on, and it keeps nobody waiting."""
    board = Board(2)
    ours = at(board, 0)

    def flights(who: str) -> list[Flight]:
        asker.set(who)
        found = [ours.flight(f"{who} {n}") for n in range(shared_flights._EACH + 5)]
        assert all(flight.begin() for flight in found)
        return found

    def shared(who: str) -> int:
        def held() -> int:
            theirs = at(board, 1)
            names = [f"{who} {n}" for n in range(shared_flights._EACH + 5)]
            return sum(theirs.flight(name).holder != 0 for name in names)

        return elsewhere(held)

    greedy = flights("greedy")
    assert shared("greedy") == shared_flights._EACH
    for who in ("second", "third", "fourth", "fifth"):
        flights(who)
    assert shared("second") == shared_flights._EACH
    assert shared("fifth") == shared_flights._MOST - 4 * shared_flights._EACH == 0
    for flight in greedy:
        flight.end()
    assert shared("greedy") == 0
    asker.set("sixth")
    assert ours.flight("more").begin() and elsewhere(lambda: at(board, 1).flight("more").holder)


async def test_who_waits_is_told_when_it_ends() -> None:
    board = Board(2)
    ours = at(board, 0)
    flight = ours.flight("a")
    ready, go = FORK.Event(), FORK.Event()

    def run() -> None:
        async def main() -> None:
            theirs = at(board, 1).flight("a")
            assert theirs.begin()
            ready.set()
            go.wait()
            theirs.tell(NotFound("no upstream has it"))
            theirs.end()

        asyncio.run(main())

    process = FORK.Process(target=run)
    process.start()
    await asyncio.to_thread(ready.wait)
    assert not flight.begin()
    with flight.watching() as watched:
        news = watched.news
        go.set()
        await asyncio.wait_for(news.wait(), PATIENCE)  # not in a moment, but because it is told
        while flight.holder:
            await asyncio.sleep(0)
    with pytest.raises(NotFound, match="no upstream has it"):
        flight.check(0.0)
    await asyncio.to_thread(process.join)


async def test_what_a_killed_one_brought_is_brought_by_who_waits() -> None:
    """Nobody tells him, and nobody else asks."""
    board = Board(2)
    ours = at(board, 0)
    ready = FORK.Event()

    def run() -> None:
        async def main() -> None:
            assert at(board, 1).flight("a").begin()
            ready.set()
            await asyncio.sleep(PATIENCE)

        asyncio.run(main())

    process = FORK.Process(target=run)
    process.start()
    await asyncio.to_thread(ready.wait)

    async def look() -> str | None:
        return None

    async def bring() -> str:
        return "brought"

    async def waits() -> bool:
        return bool(ours._watched)

    task = asyncio.create_task(ours.once("a", look, bring, lasting(0)))
    await eventually(waits)
    process.kill()
    assert await asyncio.wait_for(task, PATIENCE) == "brought"
    await asyncio.to_thread(process.join)


async def test_what_was_brought_while_one_looked_is_found() -> None:
    """Between the look and the lock another worker's flight may end."""
    board, stored = Board(2), list[str]()

    def bring_it() -> None:
        theirs = at(board, 1).flight("a")
        assert theirs.begin()
        theirs.end()

    async def look() -> str | None:
        found = stored[0] if stored else None
        if not stored:
            elsewhere(bring_it)
            stored.append("there")
        return found

    async def bring() -> str:
        return "brought twice"

    assert await at(board, 0).once("a", look, bring, lasting(0)) == "there"


def lasting(seconds: float, mark: int = 1) -> Lasting:
    return Lasting(lambda: mark, lambda _: seconds)


async def test_how_it_ended_holds_for_those_who_waited_and_for_its_time() -> None:
    flights = at(Board(2), 0)
    flight, other = flights.flight("a"), flights.flight("b")

    async def bring() -> None:
        raise NotFound("nobody has it")

    began = asyncio.get_running_loop().time()
    later = began + 1e6
    for seconds in (0.0, 1e6):
        with pytest.raises(NotFound):
            await flight.telling(bring, lasting(seconds))
        with pytest.raises(NotFound):
            flight.check(began, lasting(0))
        if seconds:
            with pytest.raises(NotFound):
                flight.check(later, lasting(0))
        flight.check(later, lasting(0, mark=2))  # something arrived
        other.check(0.0)
    flight.check(later)


async def test_what_was_half_written_counts_as_nothing() -> None:
    board = Board(2)
    flight = at(board, 0).flight("a")
    flight.tell(Refused("unsigned", "nobody signed it"))
    start = flight._outcome
    said = bytes(board.memory[start : start + 100])
    for n in (16, 30, 50, 60):
        board.memory[start + n : start + n + 1] = bytes([said[n] ^ 1])
        flight.check(0.0)
        board.memory[start + n : start + n + 1] = said[n : n + 1]
    with pytest.raises(Refused, match="nobody signed it"):
        flight.check(0.0)


@pytest.mark.parametrize(
    "error",
    [
        NotFound("nobody has it"),
        Refused("unsigned", "ä" * 2000),
        Denied("its rule"),
        UpstreamTimeout("it hangs"),
        MalformedNar("no", offset=3),
        Malformed("no"),
    ],
)
def test_errors_are_told_as_they_are(error: NarsealError) -> None:
    said = told(error, most=460)
    assert said and len(said) <= 460
    again = heard(said)
    assert again and (again.status, again.reason) == (error.status, error.reason)
    assert str(again)[:20] == str(error)[:20]


def test_what_a_worker_lacks_is_nobody_elses_error() -> None:
    assert told(Unavailable("no memory"), most=460) is None


async def test_how_far_a_file_is_is_known_elsewhere_and_forgotten() -> None:
    board = Board(2)
    ours = at(board, 0)
    name = f"{os.getpid()}-{'ab' * 16}"

    def seen() -> Any:
        shown = at(board, 1).flight("a").shown()
        return (shown.name, shown.look()) if shown else None

    flight = ours.flight("a")
    assert flight.begin() and elsewhere(seen) is None
    progress = flight.show(name)
    assert progress and elsewhere(seen) == (name, (0, 0, False))
    progress.advance(30, 20)
    assert elsewhere(seen) == (name, (30, 20, False))
    progress.advance(30, 30, is_whole=True)
    assert elsewhere(seen) == (name, (30, 30, True))
    progress.end()
    assert elsewhere(seen) is None
    progress = flight.show(name)
    flight.end()
    assert progress and elsewhere(seen) is None, "who says it has the flight no more"


async def test_what_a_killed_one_said_of_its_file_is_no_other_ones() -> None:
    board = Board(3)

    def die_midway() -> None:
        flight = at(board, 1).flight("a")
        flight.begin()
        progress = flight.show(f"{os.getpid()}-{'ab' * 16}")
        assert progress
        progress.advance(100, 99)

    elsewhere(die_midway)
    flight = at(board, 0).flight("a")
    assert flight.begin()
    name = f"{os.getpid()}-{'cd' * 16}"

    def seen() -> Any:
        shown = at(board, 2).flight("a").shown()
        return (shown.name, shown.look()) if shown else None

    assert elsewhere(seen) is None
    assert flight.show(name)
    assert elsewhere(seen) == (name, (0, 0, False))


async def test_a_number_of_another_file_in_the_same_place_is_not_taken() -> None:
    board = Board(2)
    flights = at(board, 0)
    first, second = flights.flight("a"), flights.flight("b")
    assert first.begin() and second.begin()
    name = f"{os.getpid()}-{'ab' * 16}"
    progress = first.show(name)
    assert progress
    progress.advance(10, 10)
    shown = Shown.of(board, first.key, os.getpid())
    assert shown and shown.look() == (10, 10, False)
    progress.end()
    assert shown.look() is None
    again = second.show(name)
    assert again
    again.advance(10, 10)
    assert shown.look() is None


async def test_nothing_is_said_of_a_file_that_is_brought_alone() -> None:
    """There is room to say it of more files than one asker may have."""
    assert board_room.FILES >= 2 * shared_flights._EACH
    flights = at(Board(1), 0)
    alone = flights.flight("a")
    assert alone.show("1-ab") is None


async def test_a_small_thing_is_not_waited_for_for_long() -> None:
    """It may be in the memory of the other worker, which waits for a disk that hangs."""
    flights = at(Board(2), 0)
    assert flights.flight("a").begin()
    with pytest.raises(TimeoutError):
        await flights.flight("a").handed(patience=0)
    assert await flights.flight("b").handed(patience=0) is None


async def test_a_small_thing_is_handed_to_those_who_wait_and_is_no_other() -> None:
    board = Board(2)
    ours = at(board, 0)
    flight, other = ours.flight("a"), ours.flight("b")
    assert flight.begin() and other.begin()
    assert flight.hand(b"nobody waits") is None

    def seen(name: str) -> bytes | None:
        def body() -> bytes | None:
            theirs = at(board, 1).flight(name)
            shown = theirs.shown()
            return shown.body(theirs.key) if shown else None

        return elsewhere(body)

    with flight.watching(), other.watching():
        handed, others = flight.hand(b"a" * 1000), other.hand(b"b" * 1000)
        assert handed and others
        assert (seen("a"), seen("b")) == (b"a" * 1000, b"b" * 1000)
        while (more := other.hand(b"c" * (200 << 10))) and seen("a"):
            more.end()
        assert seen("a") is None, "its bytes make room for others"
        handed.end()

"""Turns of requests that arrived in the same instant, by themselves."""

from __future__ import annotations

import asyncio
import itertools
from typing import cast

import pytest

from narseal.server.bounded import BoundedProtocol
from narseal.server.request_queue import RequestQueue


class Connection:
    """What the queue knows of one."""

    def __init__(self, queue: RequestQueue, address: str, begun: list[str]) -> None:
        self.queue, self.address, self.begun = queue, address, begun
        self.fails = self.is_closed = False

    def come(self) -> None:
        """Bring a request."""
        if self.queue.may_begin(cast("BoundedProtocol", self)):
            self.begun.append(self.address)
        else:
            self.queue.add(self.address, cast("BoundedProtocol", self))

    def go_on(self) -> None:
        if self.fails:
            raise ValueError("what it brought cannot be read")
        self.come()

    def force_close(self) -> None:
        self.is_closed = True


async def turns(begun: list[str], count: int) -> list[int]:
    """How many were begun before each turn of the loop, until so many were."""
    found = [len(begun)]
    while len(begun) < count:
        await asyncio.sleep(0)
        found.append(len(begun))
        assert len(found) < 1000
    return found


async def test_some_are_begun_in_each_turn_and_all_in_the_end() -> None:
    begun: list[str] = []
    queue = RequestQueue(asyncio.get_running_loop())
    for _ in range(300):
        Connection(queue, "one", begun).come()
    found = await turns(begun, 300)
    assert max(b - a for a, b in itertools.pairwise(found)) <= 32
    Connection(queue, "one", begun).come()  # nobody waits any more
    assert len(begun) == 301


async def test_the_clients_have_turns() -> None:
    begun: list[str] = []
    queue = RequestQueue(asyncio.get_running_loop())
    for address, count in (("greedy", 200), ("one", 1), ("other", 2)):
        for _ in range(count):
            Connection(queue, address, begun).come()
    await turns(begun, 203)
    assert begun[32:37] == ["greedy", "one", "other", "greedy", "other"]


async def test_one_that_fails_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    begun: list[str] = []
    queue = RequestQueue(asyncio.get_running_loop())
    connections = [Connection(queue, "one", begun) for _ in range(100)]
    for connection in connections[32:]:
        connection.fails = connection is connections[32]
    for connection in connections:
        connection.come()
    await turns(begun, 99)
    assert [c.is_closed for c in connections].count(True) == 1 and connections[32].is_closed
    assert "could not be read" in caplog.text

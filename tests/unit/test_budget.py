"""Memory that many hold together."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from narseal.errors import Unavailable
from narseal.runtime.budget import Budget, counted


def test_all_together_and_each_one_are_bounded() -> None:
    budget = Budget(100, each=60)
    first, again, second = budget.claim("a"), budget.claim("a"), budget.claim("b")
    first.take(40)
    again.take(20)
    with pytest.raises(Unavailable):
        again.take(1)
    second.take(40)
    with pytest.raises(Unavailable):
        second.take(1)
    again.release()
    second.take(20)
    with pytest.raises(Unavailable):
        first.take(1)


def test_what_is_let_go_of_is_there_for_others_once() -> None:
    budget = Budget(10, each=100)
    with budget.claim("a") as claim:
        claim.take(10)
    claim.release()
    rest = budget.claim("c")
    rest.take(10)
    with pytest.raises(Unavailable):
        rest.take(1)


async def test_chunks_are_counted_before_they_are_given_out() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"1234"

    seen = []
    with pytest.raises(Unavailable), Budget(10, each=10).claim("a") as claim:
        async for chunk in counted(chunks(), claim):
            seen.append(chunk)
    assert seen == [b"1234"] * 2

"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.tools.upstream import FakeCache, fake_cache


@pytest.fixture
async def upstream() -> AsyncIterator[FakeCache]:
    """A running cache that can be told to misbehave."""
    async with fake_cache() as cache:
        yield cache


@pytest.fixture
async def second() -> AsyncIterator[FakeCache]:
    """Another one."""
    async with fake_cache() as cache:
        yield cache

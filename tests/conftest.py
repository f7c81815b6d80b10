"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from tests.tools.upstream import FakeCache, fake_cache

_LEFT_OUT = pytest.StashKey[int]()


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the marker `nixpkgs` out where its library is not there, and say so."""
    if "NIXPKGS_LIB" in os.environ:
        return
    left_out = [item for item in items if item.get_closest_marker("nixpkgs")]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
        config.stash[_LEFT_OUT] = len(left_out)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say aloud what was left out."""
    if _LEFT_OUT in config.stash:
        count = config.stash[_LEFT_OUT]
        terminalreporter.write_line(
            f"left out: {count} test(s) marked nixpkgs; set NIXPKGS_LIB to nixpkgs' lib folder"
        )

"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from tests.tools.upstream import FakeCache, fake_cache

#: Markers of tests that need something which no registry has: the variable that names its folder.
_OPTIONAL = {
    "nixpkgs": ("NIXPKGS_LIB", "nixpkgs' lib folder"),
    "conformance": ("SIGSTORE_CONFORMANCE", "a clone of sigstore/sigstore-conformance"),
}
_LEFT_OUT = pytest.StashKey[dict[str, int]]()


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
    """Leave out what needs something that is not there, and say so."""
    config.stash[_LEFT_OUT] = {}
    for marker, (variable, _) in _OPTIONAL.items():
        if variable in os.environ:
            continue
        left_out = [item for item in items if item.get_closest_marker(marker)]
        if left_out:
            items[:] = [item for item in items if item not in left_out]
            config.hook.pytest_deselected(items=left_out)
            config.stash[_LEFT_OUT][marker] = len(left_out)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say aloud what was left out."""
    for marker, count in config.stash.get(_LEFT_OUT, {}).items():
        variable, what = _OPTIONAL[marker]
        terminalreporter.write_line(
            f"left out: {count} test(s) marked {marker}; set {variable} to {what}"
        )

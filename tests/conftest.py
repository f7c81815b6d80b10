"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, settings

from tests.tools.upstream import FakeCache, fake_cache

# how fast an example is made and tried says how busy the machine is, and nothing of the code
settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy machine")

#: Markers of tests that need something which no registry has: the variable that names its folder.
_OPTIONAL = {
    "nixpkgs": ("NIXPKGS_LIB", "nixpkgs' lib folder"),
    "conformance": ("SIGSTORE_CONFORMANCE", "a clone of sigstore/sigstore-conformance"),
}


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
    """Leave out what needs something that is not there."""
    missing = [marker for marker, (variable, _) in _OPTIONAL.items() if variable not in os.environ]
    left_out = [item for item in items if any(map(item.get_closest_marker, missing))]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud what was left out."""
    for marker, (variable, what) in _OPTIONAL.items():
        if variable not in os.environ:
            terminalreporter.write_line(
                f"left out: what is marked {marker}; set {variable} to {what}"
            )

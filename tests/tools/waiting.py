"""Waiting for what must come, however busy the machine is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

#: Seconds. What must come has come long before on a quiet machine; nothing is measured with it.
PATIENCE = 240.0


def until(condition: Callable[[], object], what: str = "it did not happen") -> None:
    """Wait until the condition is true; AssertionError if that never comes."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


async def eventually(
    condition: Callable[[], Awaitable[object]], what: str = "it did not happen"
) -> None:
    """The same for a condition that has to be asked for."""
    deadline = time.monotonic() + PATIENCE
    while not await condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)

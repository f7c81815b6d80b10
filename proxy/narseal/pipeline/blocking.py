"""Where blocking work runs: one bounded pool of threads a worker, never the loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Blocking:
    """Hashing, compression and disk work; most of it lets go of the interpreter's lock."""

    def __init__(self) -> None:
        threads = min(32, 4 + 2 * (os.cpu_count() or 1))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="blocking")

    def run(self, work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """Start `work(*args)` in a thread at once; the future is its result."""
        return asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    def close(self) -> None:
        """Wait for what runs."""
        self._pool.shutdown()

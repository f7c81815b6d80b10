"""Where work runs: what blocks in two bounded pools of threads a worker, never on the loop.

What only computes runs on the loop while it is small, since a hand-over to a thread costs more, and
else in one thread: more of them would not be faster, and the loop would wait for each.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import cache, partial
from typing import TypeVar

T = TypeVar("T")

#: Bytes of text that are parsed, verified or signed in well under 10 ms.
_SMALL = 64 << 10


@cache
def _computing() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="computing")


os.register_at_fork(after_in_child=_computing.cache_clear)  # threads stay with the parent


async def by_size(size: int, work: Callable[..., T], *args: object) -> T:
    """`work(*args)`, which computes and does not wait, on `size` bytes: in a thread if they are many."""
    if size <= _SMALL:
        return work(*args)
    return await asyncio.get_running_loop().run_in_executor(
        _computing(), partial(copy_context().run, work, *args)
    )


class ThreadPools:
    """Hashing, compression and disk work; most of it lets go of the interpreter's lock."""

    def __init__(self, *, transfers: int) -> None:
        threads = min(32, 4 + 2 * (os.cpu_count() or 1))
        self._short = ThreadPoolExecutor(threads, thread_name_prefix="blocking")
        self._long = ThreadPoolExecutor(transfers, thread_name_prefix="transfer")

    def run(self, work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """Start `work(*args)`, which takes milliseconds, in a thread; the future is its result."""
        return asyncio.get_running_loop().run_in_executor(self._short, work, *args)

    def start(self, work: Callable[..., T], *args: object) -> Future[T]:
        """The same for a caller that is a thread itself, and waits with `result()`."""
        return self._short.submit(work, *args)

    def run_transfer(self, work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """Start work that waits for an upstream, so that it holds up nothing else."""
        return asyncio.get_running_loop().run_in_executor(self._long, work, *args)

    def close(self) -> None:
        """Wait for what runs."""
        self._long.shutdown()
        self._short.shutdown()

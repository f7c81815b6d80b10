"""The owner of background tasks: none is forgotten, none outlives the service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextvars import Context
from time import monotonic
from typing import Any, TypeVar

_log = logging.getLogger(__name__)
T = TypeVar("T")


class BackgroundTasks:
    """Tasks that end with `close`; one that fails unheard is logged."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(
        self, work: Coroutine[Any, Any, T], name: str, context: Context | None = None
    ) -> asyncio.Task[T]:
        """Run `work` beside its caller, in a copy of its context unless another is given."""
        task = asyncio.create_task(work, name=name, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("task %s failed", task.get_name(), exc_info=error)

    async def close(self, *, wait: float) -> None:
        """Let the tasks end for `wait` seconds, then cancel what still runs."""
        deadline = monotonic() + wait
        while self._tasks and (left := deadline - monotonic()) > 0:  # they may start others
            await asyncio.wait(self._tasks, timeout=left)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

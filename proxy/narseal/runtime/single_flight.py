"""One flight per key: whoever asks for what is already under way waits for the same answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from narseal.errors import NarsealError
from narseal.runtime.tasks import BackgroundTasks

K = TypeVar("K")
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """Flights belong to the background tasks: a caller who leaves does not end one that others wait for."""

    def __init__(self, tasks: BackgroundTasks, *, on_joined: Callable[[], None]) -> None:
        self._tasks = tasks
        self._on_joined = on_joined
        self._running: dict[K, asyncio.Future[V]] = {}

    def __contains__(self, key: K) -> bool:
        """Whether the flight of a key is under way."""
        return key in self._running

    async def join(self, key: K, work: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """The result, or the error, of `work` or of the flight that is already under way."""
        future = self._running.get(key)
        if future is None:
            future = self._running[key] = asyncio.get_running_loop().create_future()
            self._tasks.start(self._fly(key, work, future), f"flight {key}")
        else:
            self._on_joined()
        return await asyncio.shield(future)

    async def _fly(
        self, key: K, work: Callable[[], Coroutine[Any, Any, V]], future: asyncio.Future[V]
    ) -> None:
        try:
            result = await work()
        except NarsealError as error:
            self._fail(future, error)
        except BaseException as error:
            self._fail(future, error)
            raise
        else:
            future.set_result(result)
        finally:
            del self._running[key]

    @staticmethod
    def _fail(future: asyncio.Future[V], error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            future.cancel()
            return
        future.set_exception(error)
        future.exception()  # seen: the last of those who wait may have left

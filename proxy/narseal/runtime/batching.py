"""Answering questions together that come at the same time: one statement serves many callers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Batcher(Generic[Q, A]):
    """While one group is being answered, the next one gathers.

    `answer` takes a group of at most so many and returns an answer, or the error, for each of it; an error that it
    raises is everybody's.
    """

    def __init__(
        self, answer: Callable[[list[Q]], Awaitable[list[A | Exception]]], *, most: int
    ) -> None:
        self._answer = answer
        self._most = most
        self._queue: asyncio.Queue[tuple[Q, asyncio.Future[A]] | None] = asyncio.Queue(4096)

    async def ask(self, question: Q) -> A:
        """The answer to one question."""
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        await self._queue.put((question, future))
        return await future

    async def close(self) -> None:
        """Let `run` end once it answered what was asked before."""
        await self._queue.put(None)

    async def run(self) -> None:
        """Answer until closed.

        What works for the answer is never cancelled: a caller that is gone leaves its question.
        """
        item = await self._queue.get()
        while item is not None:
            group = [item]
            while (
                len(group) < self._most
                and not self._queue.empty()
                and (item := self._queue.get_nowait())
            ):
                group.append(item)
            outcomes: list[A | Exception]
            try:
                outcomes = await self._answer([question for question, _ in group])
            except Exception as error:  # whatever it is, its callers get it and the next are served
                outcomes = [error] * len(group)
            for (_, future), outcome in zip(group, outcomes, strict=True):
                if future.done():
                    continue
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)
            if item is not None:
                item = await self._queue.get()

"""Giving what comes in small pieces to a thread in larger ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

_PORTION = 256 << 10

#: aiohttp's read_bufsize, and ours: bytes that are parsed ahead of who reads them, and a sixteenth as many chunks, so
#: that chunks of one byte do not keep the loop (its default, 256 KiB, is 0.1 s of them at a time).
READ_AHEAD = 64 << 10

#: Starts work on some bytes in a thread.
Run = Callable[[Callable[[bytes], object], bytes], "asyncio.Future[object]"]


async def in_turns(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """All of `chunks`, with a turn for everybody else after each: what is there already waits for nothing."""
    async for chunk in chunks:
        yield chunk
        await asyncio.sleep(0)


async def in_portions(
    chunks: AsyncIterator[bytes], work: Callable[[bytes], object], run: Run
) -> int:
    """Have `run` do `work` on all of `chunks`, in order, up to 256 KiB at a time; bytes in all.

    However it ends, no thread is at work any more when it has ended.
    """
    portion = bytearray()
    total = 0
    async for chunk in in_turns(chunks):
        total += len(chunk)
        if portion and len(portion) + len(chunk) > _PORTION:
            full = bytes(portion)
            portion.clear()
            await _whole(run(work, full))
        portion += chunk
    if portion:
        await _whole(run(work, bytes(portion)))
    return total


async def _whole(job: asyncio.Future[object]) -> None:
    """Wait for the job, even if whoever waits for it is cancelled."""
    try:
        await asyncio.shield(job)
    finally:
        if not job.done():
            await asyncio.wait([job])

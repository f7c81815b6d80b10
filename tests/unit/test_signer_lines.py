"""Connections to the signer: who is served, how much of each waits, and for how long."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from narseal.custody import wire
from narseal.signer import lines
from narseal.signer.lines import Frame, Lines
from tests.tools.waiting import PATIENCE, eventually

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Desk:
    """Lines whose frames are kept until the test answers them."""

    def __init__(self, path: Path, *users: int) -> None:
        self.taken: list[Frame] = []
        self.lines = Lines(users or (os.geteuid(),), self.taken.append)
        self.path = str(path)
        self.clients: list[asyncio.StreamWriter] = []

    async def connect(self) -> Streams:
        streams = await asyncio.open_unix_connection(self.path)
        self.clients.append(streams[1])
        return streams

    async def end(self) -> None:
        """Leave nothing behind."""
        self.lines.close()
        for writer in self.clients:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def comes(self, count: int) -> None:
        await until(lambda: len(self.taken) >= count)

    async def wait(self, count: int) -> None:
        """So many lines find no room for what has come."""
        await until(lambda: len(self.lines._waiting) == count)

    async def is_paused(self) -> None:
        """The only line is not read, so that nothing more is taken."""
        (line,) = self.lines._open
        transport = line._transport
        assert transport
        await until(lambda: not transport.is_reading())

    def answer(self, frame: Frame) -> None:
        frame.line.answer([(frame, {"id": 1})])


async def until(condition: Callable[[], object]) -> None:
    async def is_so() -> object:
        return condition()

    await eventually(is_so)


@asynccontextmanager
async def desk(*users: int) -> AsyncIterator[Desk]:
    with tempfile.TemporaryDirectory() as name:
        found = Desk(Path(name) / "s", *users)
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(found.lines.connect, f"{name}/s")
        try:
            yield found
        finally:
            server.close()
            await found.end()


def frame(size: int) -> bytes:
    return size.to_bytes(4, "big") + b" " * size


async def ended(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(PATIENCE):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


async def test_half_a_frame_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_PATIENCE", 0.2)
    async with desk() as found:
        half, quiet = await found.connect(), await found.connect()
        half[1].write(frame(10) + frame(wire.MAX_BYTES)[:1000])
        quiet[1].write(frame(10))
        assert await ended(half[0]) == b""
        quiet[1].write(frame(11))  # who has not begun a frame may be as quiet as he likes
        await found.comes(3)
        assert [len(each.body) for each in found.taken] == [10, 10, 11]


async def test_who_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_PATIENCE", 0.2)
    async with desk() as found:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(found.path)
            sock.sendall(frame(1) * 1000)
            await found.comes(1000)
            for each in found.taken[:]:
                each.line.answer([(each, {"id": 1, "refused": "x" * 4000})])
            frames = len(found.taken)

            async def gone() -> bool:
                with suppress(BlockingIOError):
                    sock.send(frame(1), socket.MSG_DONTWAIT)
                return False

            with pytest.raises(BrokenPipeError):
                await eventually(gone)
            assert len(found.taken) == frames


async def test_room_comes_back_with_answers_and_with_those_who_leave() -> None:
    """A user's bytes on their way are bounded, over all of his connections, halves included."""
    async with desk() as found:
        largest = frame(wire.MAX_BYTES)
        first, second, third = [await found.connect() for _ in range(3)]
        first[1].write(largest)
        second[1].write(largest[:100])
        await found.comes(1)
        await until(lambda: any(line._frames.is_within for line in found.lines._open))
        third[1].write(frame(1000))
        fourth = await found.connect()
        await found.wait(1)
        assert len(found.taken) == 1
        second[1].transport.abort()
        await found.comes(2)
        assert len(found.taken[1].body) == 1000
        fourth[1].write(largest)
        await found.wait(1)
        assert len(found.taken) == 2
        found.answer(found.taken[0])
        found.answer(found.taken[1])
        await found.comes(3)
        for _, writer in (first, third, fourth):
            writer.transport.abort()
        found.answer(found.taken[2])  # to nobody: its room comes back all the same
        for _ in range(5):
            _, writer = await found.connect()
            writer.write(largest)
            await found.comes(len(found.taken) + 1)
            found.answer(found.taken[-1])
            writer.transport.abort()


async def test_a_frame_of_several_has_its_room_until_the_last_is_answered() -> None:
    async with desk() as found:
        _, writer = await found.connect()
        writer.write(frame(wire.MAX_BYTES))
        await found.comes(1)
        several = found.taken[0]
        several.left = 3
        writer.write(frame(wire.MAX_BYTES))
        await found.comes(2)
        _, other = await found.connect()
        other.write(frame(1))
        await found.wait(1)
        for _ in range(2):
            found.answer(several)
        assert len(found.taken) == 2
        found.answer(several)
        await found.comes(3)


async def test_requests_that_wait_are_bounded_in_number() -> None:
    async with desk() as found:
        reader, writer = await found.connect()
        writer.write(frame(0) * 5000)
        await found.comes(1024)
        await found.is_paused()
        assert len(found.taken) == 1024
        for each in range(5000):
            await found.comes(each + 1)
            found.answer(found.taken[each])
        assert len(await reader.readexactly(5000 * len(wire.encode({"id": 1}))))
        writer.write(b"\0\0\0\2[]" * 100)  # each may have 64 requests in it
        await found.comes(5000 + 16)
        await found.is_paused()
        assert len(found.taken) == 5000 + 16


async def test_another_user_is_turned_away_and_nobody_has_every_line() -> None:
    async with desk(os.geteuid() + 1) as found:
        reader, writer = await found.connect()
        writer.write(frame(1))
        assert await ended(reader) == b""
        assert not found.taken
    async with desk() as found:
        kept = [await found.connect() for _ in range(64)]
        for _, writer in kept:
            writer.write(frame(1))
        await found.comes(64)
        reader, _ = await found.connect()
        assert await ended(reader) == b""
        kept[0][1].transport.abort()
        await until(lambda: len(found.lines._open) == 63)
        reader, writer = await found.connect()
        writer.write(frame(1))
        await found.comes(65)

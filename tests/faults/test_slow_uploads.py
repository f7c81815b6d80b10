"""Uploads that do not come: they hold no room for longer than they may, and the others have theirs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.faults.test_uploads import ITEM, Uploader, uploading
from tests.tools.cache import entry
from tests.tools.narseal import metric
from tests.tools.waiting import PATIENCE

LARGE = entry("large-1", bytes(range(256)) * 400, compression="none")
#: What a chunked body goes on with, if anything.
Rest = Callable[[], AsyncIterator[bytes]]


async def nothing() -> AsyncIterator[bytes]:
    await asyncio.sleep(PATIENCE)
    yield b""


async def drops() -> AsyncIterator[bytes]:
    while True:
        await asyncio.sleep(0.05)
        yield b"1\r\nx\r\n"


async def stalled(uploader: Uploader, name: str, rest: Rest) -> bytes:
    """The answer to one who sends 60,000 bytes of a body, and then what there is in `rest`."""
    host, port = uploader.client.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"PUT /{name} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        f"Authorization: {uploader.headers['Authorization']}\r\n\r\n"
    )
    writer.write(head.encode() + b"ea60\r\n" + LARGE.file[:60_000] + b"\r\n")

    async def go_on() -> None:
        async for piece in rest():
            writer.write(piece)

    going = asyncio.create_task(go_on())
    try:
        return await asyncio.wait_for(reader.readuntil(b"\r\n"), PATIENCE)
    finally:
        going.cancel()
        writer.close()


@pytest.mark.parametrize("rest", [nothing, drops])
@pytest.mark.parametrize("kind", ["nar", "log", "narinfo"])
async def test_an_upload_that_stalls_is_answered_and_holds_no_room(
    kind: str, rest: Rest, tmp_path: Path
) -> None:
    """It held its share of upload.quarantine_size until its connection ended."""
    names = {
        "nar": LARGE.info.url,
        "log": f"log/{'0' * 32}-x.drv",
        "narinfo": f"{LARGE.hash}.narinfo",
    }
    before = metric("narseal_slow_uploads_total")
    async with uploading(tmp_path, quarantine_size="160K", stall_timeout="1s") as uploader:
        answers = await asyncio.gather(*(stalled(uploader, names[kind], rest) for _ in range(2)))
        assert {answer.split()[1] for answer in answers} == {b"408"}
        assert metric("narseal_slow_uploads_total") - before == 2
        waiting = uploader.client.storage / ".narseal"
        for folder in ("arriving", "uploads"):
            assert not list((waiting / folder).iterdir())
        assert await uploader.path(LARGE) == (201, "")  # it needs more than was left before


async def test_an_upload_that_comes_slowly_is_taken(tmp_path: Path) -> None:
    """In pieces, each of them sooner than a body must bring one, and in all more than the least."""

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(ITEM.file), 40):
            yield ITEM.file[at : at + 40]
            await asyncio.sleep(0.02)

    async with uploading(tmp_path, stall_timeout="30s") as uploader:
        assert (await uploader.put(ITEM.info.url, pieces()))[0] == 201
        assert (await uploader.put(f"{ITEM.hash}.narinfo", ITEM.info.render()))[0] == 201

"""Many uploaders and readers at once; and a narseal that is killed in the middle of it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp

from narseal.custody import tokens
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.upkeep.check import Subject, problems
from narseal.storage import LocalStorage
from tests.tools.cache import Entry, entry
from tests.tools.command import narseal_command
from tests.tools.narseal import OPERATOR, Process, is_countersigned, narseal_process
from tests.tools.waiting import eventually

KILLS = 50


def uploading(folder: Path) -> tuple[str, dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    token = tokens.add(folder / "tokens", "ci", allow=("*",), expires=None)[1]
    return token, {"enabled": True, "tokens_file": str(folder / "tokens")}


def paths(count: int) -> list[Entry]:
    return [entry(f"u{n}", b"%d" % n * 50, compression="zstd") for n in range(count)]


async def upload(session: aiohttp.ClientSession, url: str, item: Entry) -> int:
    async with session.put(f"{url}/{item.info.url}", data=item.file) as response:
        if response.status not in (200, 201):
            return response.status
    async with session.put(f"{url}/{item.hash}.narinfo", data=item.info.render()) as response:
        return response.status


def check(proxy_folder: Path) -> list[str]:
    result = narseal_command(
        "index", "check", "--content", "--json", "--config", proxy_folder / "narseal.toml"
    )
    assert result.stdout, result.stderr
    found: list[str] = json.loads(result.stdout)["problems"]
    return found


async def test_eight_uploaders_and_64_readers(tmp_path: Path) -> None:
    """200 paths each, half of them shared with the next uploader."""
    token, settings = uploading(tmp_path)
    items = paths(8 * 100 + 100)
    statuses: set[int] = set()
    seen: set[int] = set()
    done = asyncio.Event()
    with narseal_process(tmp_path, upload=settings, workers=2) as proxy:
        headers = {"Authorization": f"Bearer {token}"}
        async with (
            aiohttp.ClientSession(headers=headers) as writing,
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as reading,
        ):

            async def bring(number: int) -> None:
                for item in items[number * 100 : number * 100 + 200]:
                    statuses.add(await upload(writing, proxy.url, item))

            async def read(number: int) -> None:
                chance = random.Random(number)
                while not done.is_set():
                    item = chance.choice(items)
                    async with reading.get(f"{proxy.url}/{item.hash}.narinfo") as response:
                        body = await response.read()
                        seen.add(response.status)
                    if response.status == 200:
                        assert is_countersigned(NarInfo.parse(body))
                        async with reading.get(f"{proxy.url}/{item.info.url}") as response:
                            assert (response.status, await response.read()) == (200, item.file)

            readers = [asyncio.create_task(read(n)) for n in range(64)]
            await asyncio.gather(*(bring(n) for n in range(8)))
            done.set()
            await asyncio.gather(*readers)
            assert statuses <= {200, 201}
            assert seen <= {200, 404}
            for item in items:
                async with reading.get(f"{proxy.url}/{item.hash}.narinfo") as response:
                    assert response.status == 200
        assert check(tmp_path) == []


def test_killed_in_the_middle_of_uploads(tmp_path: Path) -> None:
    """Each time: killed with all its workers, started again, nothing is wrong, a retry succeeds."""
    token, settings = uploading(tmp_path)
    chance = random.Random(7)
    left: list[Entry] = []

    async def bring(proxy: Process, part: list[Entry], kill_after: float) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        async with aiohttp.ClientSession(headers=headers) as session:
            for item in left:
                assert await upload(session, proxy.url, item) in (200, 201)
            jobs = [asyncio.create_task(upload(session, proxy.url, item)) for item in part]
            await asyncio.sleep(kill_after)
            for pid in [*proxy.workers(), proxy.process.pid]:
                os.kill(pid, signal.SIGKILL)
            await asyncio.gather(*jobs, return_exceptions=True)

    items = paths(KILLS * 4)
    for number in range(KILLS):
        part = items[number * 4 : number * 4 + 4]
        with narseal_process(tmp_path, upload=settings) as proxy:
            asyncio.run(_until_nothing_is_wrong(tmp_path))
            asyncio.run(bring(proxy, part, chance.random() * 0.05))
        left = part
    with narseal_process(tmp_path, upload=settings) as proxy:
        asyncio.run(_until_nothing_is_wrong(tmp_path))
        asyncio.run(bring(proxy, [], 0))
    with narseal_process(tmp_path, upload=settings):
        asyncio.run(_until_nothing_is_wrong(tmp_path))
    assert check(tmp_path) == []
    stored = {path.name for path in (tmp_path / "storage").glob("*.narinfo")}
    assert stored == {f"{item.hash}.narinfo" for item in items}


async def _until_nothing_is_wrong(folder: Path) -> None:
    """A crash's gaps are mended in the first moments after the start."""
    storage = LocalStorage(f"file://{folder}/storage")
    keys = {OPERATOR.public.name: OPERATOR.public}
    subject = Subject(f"sqlite:///{folder}/index.sqlite", "/nix/store", storage, keys, content=True)

    async def nothing_is_wrong() -> bool:
        return not list(problems(subject))

    await eventually(nothing_is_wrong)


def test_index_check_finds_what_is_wrong(tmp_path: Path) -> None:
    token, settings = uploading(tmp_path)
    items = paths(4)

    async def bring(url: str) -> None:
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
            for item in items:
                assert await upload(session, url, item) == 201

    with narseal_process(tmp_path, upload=settings) as proxy:
        asyncio.run(bring(proxy.url))
    storage = tmp_path / "storage"
    assert check(tmp_path) == []
    (storage / items[0].info.url).unlink()
    data = bytearray((storage / items[1].info.url).read_bytes())
    data[-1] ^= 1
    (storage / items[1].info.url).write_bytes(data)
    (storage / f"{items[2].hash}.narinfo").unlink()
    (storage / f"{items[3].hash}.narinfo").write_bytes(items[0].info.render())
    found = "\n".join(check(tmp_path))
    for sentence in ("not in storage\n", "other content than was verified", "though its NAR is",
                     "of other content than the index says"):  # fmt: skip
        assert sentence in f"{found}\n", found


#: Looks through the index in shares of one path, by several processes.
_IN_SHARES = """
import os, sys
from narseal.pipeline.upkeep.check import Subject, problems
from narseal.storage import LocalStorage
from tests.tools.narseal import OPERATOR
os.sched_getaffinity = lambda _: {0, 1}
folder = sys.argv[1]
subject = Subject(f"sqlite:///{folder}/index.sqlite", "/nix/store",
                  LocalStorage(f"file://{folder}/storage"), {OPERATOR.name: OPERATOR.public}, True)
print(*problems(subject, share=1), sep="\\n")
"""


def test_index_check_finds_the_same_in_shares(tmp_path: Path) -> None:
    test_index_check_finds_what_is_wrong(tmp_path)
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection, connection:
        connection.execute("UPDATE total SET nar_bytes = 7")
        connection.execute("UPDATE served SET rows = rows + 1")
    found = check(tmp_path)
    for sentence in ("the index counts 7 bytes of NARs",
                     "the index counts 5 rows of path signed by ['operator-1'], there are 4;"):  # fmt: skip
        assert sentence in "\n".join(found)
    done = subprocess.run(
        [sys.executable, "-c", _IN_SHARES, str(tmp_path)], capture_output=True, text=True
    )
    assert sorted(done.stdout.splitlines()) == sorted(found), done.stderr

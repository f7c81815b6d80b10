"""Resident memory of a worker: after 100,000 narinfos, and while it relays a 2 GB NAR."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import tempfile
import time
import urllib.request
from dataclasses import replace
from functools import partial
from pathlib import Path

import aiohttp

from narseal.nix.hashes import Hash
from narseal.nix.narinfo import NarInfo
from tests.bench.servers import ALL_CORES, nginx
from tests.bench.table import Row
from tests.tools import watching
from tests.tools.cache import Entry, entry, store_path, write_cache
from tests.tools.narseal import UPSTREAM, Process, narseal_process

_NARINFOS = 100_000
_BIG = 2 << 30


def measure() -> list[Row]:
    """Megabytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        hashes = _many(folder / "cache")
        big = _big(folder / "cache")
        # all narinfos are of one NAR, which would be brought, and published with all of them
        served = partial(narseal_process, folder / "n", prefetch="references")
        with served():
            pass  # the index is made: its migrations stay in the memory of who ran them
        with (
            nginx(f"root {folder}/cache;", ALL_CORES) as upstream,
            served({"url": upstream}) as proxy,
        ):
            start = time.monotonic()
            asyncio.run(_ask(proxy.url, hashes))
            rate = _NARINFOS / (time.monotonic() - start)
            after = resident(proxy)
            curl = ["curl", "-sf", "-o", "/dev/null"]
            text = urllib.request.urlopen(f"{proxy.url}/{big.hash}.narinfo").read()
            before = resident(proxy)
            reading = subprocess.Popen([*curl, f"{proxy.url}/{NarInfo.parse(text).url}"])
            highest = before
            while reading.poll() is None:
                highest = max(highest, resident(proxy))
                time.sleep(0.05)
            assert reading.returncode == 0
    return [
        Row(f"worker's memory after {_NARINFOS:,} narinfos (cold, {rate:,.0f}/s)",
            f"{after:.0f} MB", "", None, "≤ 120 MB"),
        Row("growth while it relays a 2 GB NAR", f"{highest - before:.0f} MB", "", None, "flat"),
    ]  # fmt: skip


def _many(folder: Path) -> list[str]:
    item = entry("many")
    write_cache(folder, item)
    hashes = []
    for n in range(_NARINFOS):
        path = store_path(f"many-{n}")
        one = replace(item, info=replace(item.info, store_path=path)).signed(UPSTREAM)
        (folder / f"{path.hash_part}.narinfo").write_bytes(one.info.render())
        hashes.append(path.hash_part)
    return hashes


def _big(folder: Path) -> Entry:
    """A NAR of zeros, uncompressed: one regular file, written piece by piece."""
    small = entry("big", bytes(8), compression="none")
    head, tail = _around(small.nar)
    size = len(head) + _BIG + len(tail)

    digest = hashlib.sha256(head)
    zeros = bytes(1 << 20)
    file = folder / "nar" / "big.nar"
    with file.open("wb") as out:
        out.write(head)
        for _ in range(_BIG >> 20):
            out.write(zeros)
            digest.update(zeros)
        out.write(tail)
        digest.update(tail)
    nar_hash = Hash("sha256", digest.digest())
    info = replace(
        small.info, url="nar/big.nar", nar_hash=nar_hash, nar_size=size, file_hash=nar_hash,
        file_size=size,
    )  # fmt: skip
    signed = replace(small, info=info).signed(UPSTREAM)
    (folder / f"{signed.hash}.narinfo").write_bytes(signed.info.render())
    return signed


def _around(nar: bytes) -> tuple[bytes, bytes]:
    """What stands before and behind the contents of `data`, with its length made ours."""
    mark = (8).to_bytes(8, "little") + b"contents"
    at = nar.rindex(mark) + len(mark)
    return nar[:at] + _BIG.to_bytes(8, "little"), nar[at + 16 :]


async def _ask(url: str, hashes: list[str]) -> None:
    queue = iter(hashes)

    async def worker(session: aiohttp.ClientSession) -> None:
        for hash_part in queue:
            async with session.get(f"{url}/{hash_part}.narinfo") as response:
                assert response.status == 200
                await response.read()

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        for _ in range(32):
            group.create_task(worker(session))


def resident(proxy: Process) -> float:
    """Of the one worker, in megabytes."""
    return watching.resident(proxy.workers()[0]) / (1 << 20)

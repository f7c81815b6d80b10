"""A configuration that changes while narseal serves: no request is lost, a wrong one is refused."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path

import aiohttp
import pytest

from narseal.custody import write_private
from narseal.nix.narinfo import NarInfo
from tests.tools.cache import entry, key
from tests.tools.changing import everywhere, logged, write
from tests.tools.narseal import (
    OPERATOR,
    UPSTREAM,
    narseal_process,
)
from tests.tools.upstream import FakeCache
from tests.tools.waiting import eventually, until

ITEM = entry("app-1", b"x", compression="zstd").signed(UPSTREAM)
SECOND = key("operator-2")


async def names(session: aiohttp.ClientSession, url: str) -> set[str]:
    async with session.get(f"{url}/{ITEM.hash}.narinfo") as response:
        assert response.status == 200, await response.text()
        return {s.key_name for s in NarInfo.parse(await response.read()).signatures}


async def test_changed_policy_is_in_force_within_a_second_on_every_worker(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(ITEM)
    there = {"url": upstream.url}
    rule = {"match": "app-*", "action": "deny"}
    text = ""
    with narseal_process(tmp_path, there, workers=2) as process:
        async with aiohttp.ClientSession() as session:
            for state, (status, policy) in enumerate([(403, [rule]), (200, []), (403, [rule])]):
                assert await names(session, process.url) if status == 403 else True
                write(process, there, workers=2, policy=policy)
                if state == 1:
                    process.process.send_signal(signal.SIGHUP)
                for url in (f"{ITEM.hash}.narinfo", ITEM.info.url):

                    async def in_force(url: str = url, status: int = status) -> bool:
                        nonlocal text
                        async with session.get(f"{process.url}/{url}") as response:
                            text = await response.text(errors="replace")
                            assert response.status in (200, 403)
                            return response.status == status

                    await eventually(in_force)
                # on every worker: many connections, none of them sees the old state
                await everywhere(process, ITEM, status)
                if status == 403:
                    assert "policy[0] (app-*): action is" in text


async def test_reload_under_load_loses_no_request(tmp_path: Path, upstream: FakeCache) -> None:
    items = [entry(f"p{n}", b"%d" % n * 50_000, compression="none").signed(UPSTREAM)
             for n in range(8)]  # fmt: skip
    upstream.add(ITEM, *items)
    there = {"url": upstream.url}
    second = tmp_path / "second.secret"
    with narseal_process(tmp_path, there, workers=2) as process:
        done = asyncio.Event()
        counts = {"good": 0}

        async def read(number: int) -> None:
            # a client that finds its idle connection closed asks again on a new one, as curl does
            async with aiohttp.ClientSession() as session:
                while not done.is_set():
                    item = items[(number + counts["good"]) % len(items)]
                    for name, body in ((f"{item.hash}.narinfo", None), (item.info.url, item.file)):
                        async with session.get(f"{process.url}/{name}") as response:
                            assert response.status == 200
                            data = await response.read()
                            assert body is None or data == body
                            counts["good"] += 1

        async def answered(more: int) -> None:
            wanted = counts["good"] + more

            async def enough() -> bool:
                return counts["good"] >= wanted or any(r.done() for r in readers)

            await eventually(enough)

        readers = [asyncio.create_task(read(n)) for n in range(16)]
        write_private(second, SECOND.render())
        keys = [{"url": f"file:{tmp_path}/operator.secret"}, {"url": f"file:{second}"}]
        async with aiohttp.ClientSession() as session:
            for number, use in enumerate((keys, keys[:1], keys, keys[1:]), 1):
                await answered(50)
                write(process, there, workers=2, signing={"key": use})
                process.process.send_signal(signal.SIGHUP)
                sentence = "the changed configuration is in force"
                await asyncio.to_thread(logged, process, sentence, number)
                await answered(100)

                async def signs() -> bool:
                    return SECOND.public.name in await names(session, process.url)

                if use != keys[:1]:
                    await eventually(signs)
        done.set()
        await asyncio.gather(*readers)
        assert process.log.read_text().count("the changed configuration is in force") == 4
        until(lambda: len(process.workers()) == 2)  # those of before are gone


async def test_a_download_goes_on_with_its_old_worker(tmp_path: Path, upstream: FakeCache) -> None:
    big = entry("big", b"\0" * (16 << 20), compression="none").signed(UPSTREAM)
    upstream.add(big)
    there = {"url": upstream.url}
    limits = {"shutdown_timeout": "1s"}
    with narseal_process(tmp_path, there, limits=limits) as process:
        async with aiohttp.ClientSession() as session:
            await session.get(f"{process.url}/{big.hash}.narinfo")
            async with session.get(f"{process.url}/{big.info.url}") as response:
                body = await response.content.readexactly(1 << 20)
                write(process, there, limits=limits, priority=31)
                logged(process, "is in force")
                await asyncio.sleep(2.5)

                async def new_one_answers() -> bool:
                    async with (
                        aiohttp.ClientSession() as other,
                        other.get(f"{process.url}/nix-cache-info") as info,
                    ):
                        return "Priority: 31" in await info.text()

                await eventually(new_one_answers)
                body += await response.read()
                assert body == big.file


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("listen = ", "not TOML"),
        ('nonsense = "x"', "nonsense: there is no such setting"),
        ("workers = 2", "workers changed from 1 to 2: that needs a restart"),
        ('[[signing.key]]\nurl = "file:/nowhere/at/all"', "/nowhere/at/all: cannot be read"),
        ('[[policy]]\nmatch = "*"\nrequire = "signature"\nkeys = ["strange-1"]',
         "policy[0]: no key is called strange-1; there are: upstream-1"),
    ],
)  # fmt: skip
async def test_a_wrong_configuration_is_refused_and_the_old_one_goes_on(
    text: str, sentence: str, tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(ITEM)
    there = {"url": upstream.url}
    with narseal_process(tmp_path, there) as process:
        before = process.workers()
        file = process.folder / "narseal.toml"
        good = file.read_text()
        file.write_text(f"{text}\n{good}" if not text.startswith("[[") else f"{good}\n{text}\n")
        line = logged(process, "is refused, the old one goes on")
        assert sentence in line.replace('\\"', '"')
        async with aiohttp.ClientSession() as session:
            assert OPERATOR.public.name in await names(session, process.url)
            async with session.get(f"{process.url}/metrics") as response:
                found = await response.text()
            assert re.search(r"^narseal_config_last_reload_successful 0\.0$", found, re.MULTILINE)
            assert process.workers() == before
            file.write_text(good)
            logged(process, "the changed configuration is in force")
            assert await names(session, process.url)


async def test_a_unix_socket_stays_when_the_configuration_changes(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(ITEM)
    there = {"url": upstream.url}
    listen = {"listen": f"unix:{tmp_path}/s"}
    with narseal_process(tmp_path, there, **listen) as process:
        write(process, there, **listen, priority=35)
        logged(process, "is in force")

        async def new_one_answers() -> bool:
            async with (
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(f"{tmp_path}/s")) as session,
                session.get("http://x/nix-cache-info") as response,
            ):
                return "Priority: 35" in await response.text()

        await eventually(new_one_answers)

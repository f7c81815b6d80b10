"""Custody: signatures a second by file, agent and token, and cold narinfos with each."""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from nacl.signing import SigningKey

from narseal.custody import write_private
from narseal.custody.agent import AgentKey
from narseal.custody.file import FileKey
from narseal.custody.operator import Custodian
from narseal.custody.pkcs11 import Pkcs11Key
from narseal.custody.requests import PathRequest
from narseal.nix.keys import Signature
from tests.bench.servers import cpu_seconds
from tests.bench.table import Row
from tests.tools.cache import Entry, entry, write_cache
from tests.tools.narseal import OPERATOR, UPSTREAM, narseal_process
from tests.tools.signer import SoftHsm, signer

_SIGNATURES = 4000
_ON_THEIR_WAY = 512
_GROUP = 64
_ROUNDS = 3
_COLD = 600


def measure() -> list[Row]:
    """Each beside pynacl in this process, and beside a key in a file."""
    items = [
        entry(f"c{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(_SIGNATURES)
    ]
    with tempfile.TemporaryDirectory() as name, _keys(Path(name)) as (urls, pid):
        return [*_signing(items, urls, pid), *_cold(Path(name), items[:_COLD], urls)]


@contextmanager
def _keys(folder: Path) -> Iterator[tuple[dict[str, str], int]]:
    """URLs of the key in three places, and the signer's process."""
    folder.chmod(0o755)
    write_private(folder / "operator.secret", OPERATOR.render())
    (folder / "hsm").mkdir()
    hsm = SoftHsm(folder / "hsm")
    os.environ |= hsm.environment
    with signer() as running:
        assert running.process
        urls = {
            "file": f"file:{folder}/operator.secret",
            "agent": f"{running.url}?key=operator-1",
            "SoftHSM": hsm.url("hsm-1"),
        }
        yield urls, running.process.pid


def _signing(items: list[Entry], urls: dict[str, str], pid: int) -> list[Row]:
    requests = [PathRequest(item.info, None) for item in items]
    messages = [request.message for request in requests]
    plain = SigningKey.generate()
    start = time.perf_counter()
    for message in messages:
        plain.sign(message)
    pynacl = len(messages) / (time.perf_counter() - start)
    open_: dict[str, Callable[[str], Custodian]] = {
        "file": FileKey.load,
        "agent": AgentKey,
        "SoftHSM": Pkcs11Key,
    }
    count = _ROUNDS * len(items) / 1e6
    before = sum(os.times()[:4])
    least = _least(items, urls["file"])
    cpu = (sum(os.times()[:4]) - before) / count
    rows = [
        Row("signatures a second by two processes that verify, write down, sign and verify,"
            f" and nothing else ({cpu:.0f} µs CPU each), against pynacl",
            f"{least:,.0f}/s", f"{pynacl:,.0f}/s", least / pynacl, "")
    ]  # fmt: skip
    for name, url in urls.items():
        before = time.process_time() + cpu_seconds(pid)
        rate = uvloop.run(_rate(open_[name](url), requests))
        cpu = (time.process_time() + cpu_seconds(pid) - before) / count
        aim = "≥ 0.25" if name == "agent" else ""
        rows.append(
            Row(f"signatures a second, {name}, {_ON_THEIR_WAY} on their way"
                f" ({cpu:.0f} µs CPU each, the signer's too), against pynacl",
                f"{rate:,.0f}/s", f"{pynacl:,.0f}/s", rate / pynacl, aim)
        )  # fmt: skip
    return rows


def _least(items: list[Entry], url: str) -> float:
    """What no signer can do without: two verifications and a signature each, and a line in a file.

    The messages are there, and nothing is parsed or rendered: groups of 64 go to and fro as they are.
    """
    key = FileKey.load(url)
    messages = [item.info.fingerprint() for item in items]
    theirs = [item.info.signatures[0] for item in items]
    groups = [slice(at, at + _GROUP) for at in range(0, len(items), _GROUP)]
    ours, signers = socket.socketpair()
    rates = []
    for _ in range(_ROUNDS):
        if not (pid := os.fork()):
            try:
                _sign(signers, url, [(messages[group], theirs[group]) for group in groups])
            finally:
                os._exit(0)
        start = time.perf_counter()
        ours.sendall(bytes(min(len(groups), _ON_THEIR_WAY // _GROUP)))
        for number, group in enumerate(groups):
            wanted = messages[group]
            data = ours.recv(64 * len(wanted), socket.MSG_WAITALL)
            if number + _ON_THEIR_WAY // _GROUP < len(groups):
                ours.sendall(b"\0")
            for at, message in enumerate(wanted):
                signature = Signature(key.public.name, data[64 * at : 64 * at + 64])
                assert key.public.verifies(message, signature)
        rates.append(len(items) / (time.perf_counter() - start))
        os.waitpid(pid, 0)
    return statistics.median(rates)


def _sign(sock: socket.socket, url: str, groups: list[tuple[list[bytes], list[Signature]]]) -> None:
    key = FileKey.load(url)  # of its own: the parent's is wiped in its children
    with tempfile.TemporaryFile() as log:
        for messages, evidence in groups:
            sock.recv(1)  # one byte for each group that may be on its way
            for message, signature in zip(messages, evidence, strict=True):
                assert UPSTREAM.public.verifies(message, signature)
            log.write(b"".join(messages))
            log.flush()
            os.fsync(log.fileno())
            sock.sendall(b"".join([key.sign_message(message).data for message in messages]))


async def _rate(key: Custodian, requests: list[PathRequest]) -> float:
    slots = asyncio.Semaphore(_ON_THEIR_WAY)

    async def one(request: PathRequest) -> None:
        async with slots:
            await key.sign(request)

    rates = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        await asyncio.gather(*map(one, requests))
        rates.append(len(requests) / (time.perf_counter() - start))
    key.close()
    return statistics.median(rates)


def _cold(folder: Path, items: list[Entry], urls: dict[str, str]) -> list[Row]:
    cache = folder / "upstream"
    write_cache(cache, *items)
    rates: dict[str, list[float]] = {name: [] for name in urls}
    for round_ in range(_ROUNDS):
        for name, url in urls.items():
            place = folder / f"{name}-{round_}"
            keys = {"key": [{"url": url}]}
            with narseal_process(place, {"url": f"file://{cache}"}, signing=keys) as process:
                rates[name].append(asyncio.run(_read(process.url, items)))
    file = statistics.median(rates["file"])
    return [
        Row(f"cold narinfos a second, 64 readers, key by {name}, against a file",
            f"{statistics.median(found):,.0f}/s", f"{file:,.0f}/s",
            statistics.median(found) / file, "")
        for name, found in rates.items()
        if name != "file"
    ]  # fmt: skip


async def _read(url: str, items: list[Entry]) -> float:
    waiting = iter(items)

    async def read(session: aiohttp.ClientSession) -> None:
        for item in waiting:
            async with session.get(f"{url}/{item.hash}.narinfo") as response:
                assert response.status == 200, await response.text()

    connector: Any = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        start = time.perf_counter()
        await asyncio.gather(*(read(session) for _ in range(64)))
        return len(items) / (time.perf_counter() - start)

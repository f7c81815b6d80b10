"""Sigstore: paths signed a second, verifications, the queue's memory, and what outages cost."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from narseal.cosign import statement, trust
from narseal.cosign.bundle import Bundle
from narseal.cosign.keys import CosignKey
from narseal.cosign.sign import KeylessSigner, KeySigner, Signer
from narseal.cosign.statement import AttestedPath
from narseal.cosign.verify import ByIdentity, ByKey, Verifier
from narseal.nix.hashes import Hash
from tests.bench.memory import resident
from tests.bench.table import Row
from tests.tools.cache import entry, write_cache
from tests.tools.narseal import UPSTREAM, Process, narseal_process
from tests.tools.sigstore import Sigstore, sigstore

_PATHS = 512  # two digests each: one statement of 1,024
_ONE_BY_ONE = 8
_WAITING = 100_000
_ROUND = 500


def measure() -> list[Row]:
    """All of it beside the real services on this machine."""
    with sigstore() as instance, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return [*_signing(instance), *_verifying(instance), *_serving(instance, folder)]


def _batch() -> tuple[bytes, list[bytes]]:
    items = [entry(f"b{n}", b"%d" % n, compression="zstd") for n in range(_PATHS)]
    digests = [hashlib.sha256(item.file).digest() for item in items]
    paths = [
        AttestedPath(item.info, f"{n}.nar.zst", Hash("sha256", digest))
        for n, (item, digest) in enumerate(zip(items, digests, strict=True))
    ]
    return statement.render(paths), digests


def _signing(instance: Sigstore) -> list[Row]:
    known = trust.load(instance.trust_config_file)
    key = CosignKey.generate()
    signers: dict[str, Signer] = {
        "key, no log": KeySigner(key, None, timeout=30),
        "key, log and timestamp": KeySigner(key, known, timeout=30),
        "keyless": KeylessSigner(instance.issuer.token, known, timeout=30),
    }
    text, digests = _batch()
    rows = []
    for name, signer in signers.items():
        signer.sign_digest(digests[0])  # certificate and connections
        batch = _PATHS / _seconds(partial(signer.sign_statement, text), 5)
        count = _ONE_BY_ONE if not signer.costs_nothing else 400
        each = 1 / _seconds(partial(signer.sign_digest, digests[1]), count)
        aim = "≥ 300" if name == "keyless" else ""
        rows.append(
            Row(f"paths signed a second, {name}: in batches of {_PATHS} against one by one",
                f"{batch:,.0f}/s", f"{each:,.1f}/s", batch / each, aim)
        )  # fmt: skip
    return rows


def _verifying(instance: Sigstore) -> list[Row]:
    known = trust.load(instance.trust_config_file)
    key = CosignKey.generate()
    text, digests = _batch()
    by_key, keyless = (
        ByKey((key.public,)),
        ByIdentity(instance.issuer.identity, instance.issuer.url),
    )
    plain, logged = KeySigner(key, None, timeout=30), KeySigner(key, known, timeout=30)
    certified = KeylessSigner(instance.issuer.token, known, timeout=30)
    cases: dict[str, tuple[Verifier, bytes]] = {
        "a file by key": (Verifier(by_key, None), plain.sign_digest(digests[0])),
        "a file by key with its log entry": (
            Verifier(by_key, known),
            logged.sign_digest(digests[0]),
        ),
        "a file, keyless": (Verifier(keyless, known), certified.sign_digest(digests[0])),
        f"a batch of {_PATHS}, keyless": (Verifier(keyless, known), certified.sign_statement(text)),
    }
    rows = []
    for name, (verifier, data) in cases.items():
        times = []
        for _ in range(300):
            start = time.perf_counter()
            verifier.verify(Bundle.parse(data), digests[0])
            times.append((time.perf_counter() - start) * 1000)
        times.sort()
        rows.append(
            Row(f"verification of {name}", f"{1000 / statistics.mean(times):,.0f}/s",
                f"p50 {times[150]:.2f} ms, p99 {times[296]:.2f} ms", None, "p99 < 500 ms")
        )  # fmt: skip
    return rows


def _serving(instance: Sigstore, folder: Path) -> list[Row]:
    """Latency of cold narinfos and NARs: cosign off, on, and on with Rekor frozen, in turns."""
    items = [entry(f"s{n}", b"%d" % n).signed(UPSTREAM) for n in range(9 * _ROUND)]
    write_cache(folder / "cache", *items)
    token = folder / "token"
    token.write_text(instance.issuer.token(lifetime=7200))
    on = {
        "mode": "keyless", "identity_token_file": str(token), "batch_max_age": "1s",
        "trust_config": str(instance.trust_config_file), "timeout": "5s",
    }  # fmt: skip
    hashes = iter([item.hash for item in items])
    upstream = {"url": f"file://{folder}/cache"}
    found: dict[str, list[tuple[float, float]]] = {"off": [], "well": [], "frozen": []}
    with (
        narseal_process(folder / "off", upstream) as off,
        narseal_process(folder / "on", upstream, cosign=on) as proxy,
    ):
        for _ in range(3):
            for state, url in (("off", off.url), ("well", proxy.url), ("frozen", proxy.url)):
                if state == "frozen":
                    instance.rekor.freeze()
                part = [next(hashes) for _ in range(_ROUND)]
                found[state].append(asyncio.run(_latency(url, part)))
                instance.rekor.thaw()
                _until(lambda: "narseal_attest_queue 0" in _metrics(proxy))
    middle = {
        state: [statistics.median(values) for values in zip(*rounds, strict=True)]
        for state, rounds in found.items()
    }
    rows = [
        Row(f"a cold narinfo and its NAR, {name}: {what}", f"{middle[mine][at]:.1f} ms",
            f"{middle[other][at]:.1f} ms", middle[mine][at] / middle[other][at], aim)
        for at, name in enumerate(("p50", "p99"))
        for what, mine, other, aim in (
            ("while batches are signed, against cosign off", "well", "off", ""),
            ("Rekor frozen, against Rekor well", "frozen", "well", "≤ 1.2"),
        )
    ]  # fmt: skip
    return [*rows, _queue(folder, upstream, on, instance)]


async def _latency(url: str, hashes: list[str]) -> tuple[float, float]:
    """Milliseconds that 50 and 99 of 100 narinfos with their NARs took at most, two at a time."""
    times: list[float] = []
    waiting = iter(hashes)
    async with aiohttp.ClientSession() as session:

        async def ask() -> None:
            for hash_part in waiting:
                start = time.perf_counter()
                async with session.get(f"{url}/{hash_part}.narinfo") as response:
                    text = await response.text()
                nar = text.split("URL: ", 1)[1].split("\n", 1)[0]
                async with session.get(f"{url}/{nar}") as response:
                    await response.read()
                times.append((time.perf_counter() - start) * 1000)

        await asyncio.gather(*(ask() for _ in range(2)))
    times.sort()
    return times[len(times) // 2], times[len(times) * 99 // 100]


def _queue(folder: Path, upstream: dict[str, Any], on: dict[str, Any], instance: Sigstore) -> Row:
    """A worker's memory with a long queue that cannot be signed, against none."""
    home = folder / "queue"
    instance.rekor.freeze()
    try:
        with narseal_process(home, upstream, cosign=on) as proxy:
            time.sleep(2)
            before = resident(proxy)
        _fill(home / "index.sqlite")
        with narseal_process(home, upstream, cosign=on) as proxy:
            _until(lambda: "narseal_attest_queue 1" in _metrics(proxy))
            time.sleep(8)
            after = resident(proxy)
    finally:
        instance.rekor.thaw()
    return Row(f"worker's memory with {_WAITING:,} paths waiting, against none", f"{after:.0f} MB",
               f"{before:.0f} MB", after / before, "")  # fmt: skip


def _fill(index: Path) -> None:
    now = time.time()
    nars, paths, waiting = [], [], []
    for n in range(_WAITING):
        digest = hashlib.sha256(b"%d" % n).digest()
        file = f"{Hash('sha256', digest).nix32}.nar.zst"
        hash_part = Hash("sha256", digest).nix32[:32]
        nars.append((file, digest, 1000, "zstd", digest, 500, "x", file, 1))
        paths.append((hash_part, f"q{n}", digest, 1000, "", "", "[]", file, "content", now, 0))
        waiting.append((hash_part, now))
    with closing(sqlite3.connect(index)) as connection:
        connection.executemany(
            "INSERT INTO nar (file, nar_hash, nar_size, compression, file_hash, file_size,"
            " upstream, url, stored) VALUES (?,?,?,?,?,?,?,?,?)", nars
        )  # fmt: skip
        connection.executemany(
            "INSERT INTO path (hash_part, name, nar_hash, nar_size, refs, signatures, extra,"
            " nar_file, evidence, admitted_at, withdrawn) VALUES (?,?,?,?,?,?,?,?,?,?,?)", paths
        )  # fmt: skip
        connection.executemany("INSERT INTO waiting VALUES (?,?)", waiting)
        connection.execute("UPDATE total SET waiting = waiting + ?", (_WAITING,))
        connection.commit()


def _metrics(proxy: Process) -> str:
    from urllib.request import urlopen

    return str(urlopen(f"{proxy.url}/metrics").read().decode())


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _seconds(work: Callable[[], object], count: int) -> float:
    """For one, of `count`."""
    start = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - start) / count

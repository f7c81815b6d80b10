"""Services that are down, frozen or talk rubbish; a narseal that is killed. Nothing is lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from narseal.cosign import trust
from narseal.cosign.bundle import Bundle
from narseal.cosign.keys import CosignKey
from narseal.cosign.sign import KeylessSigner, KeySigner
from narseal.cosign.verify import ByIdentity, ByKey, Verifier
from narseal.errors import UpstreamTrouble
from tests.real.sigstore.conftest import IDENTITY, sha256
from tests.tools.cache import Entry, entry
from tests.tools.narseal import UPSTREAM, metric, narseal, narseal_process
from tests.tools.sigstore import Sigstore
from tests.tools.upstream import FakeCache
from tests.tools.waiting import PATIENCE, until

pytestmark = pytest.mark.real

PATHS = 2000
QUICK = {"batch_max_age": "300ms", "timeout": "2s", "retry_max": "1s"}


def keyless(instance: Sigstore, folder: Path) -> dict[str, Any]:
    """The `[cosign]` section; nothing is listening to the token's clock in a short test."""
    token = folder / "token"
    token.write_text(instance.issuer.token(IDENTITY))
    token.chmod(0o600)
    return QUICK | {
        "mode": "keyless",
        "identity_token_file": str(token),
        "trust_config": str(instance.trust_config_file),
    }


def entries(count: int) -> list[Entry]:
    return [entry(f"q{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(count)]


def attested(index: Path) -> Counter[str]:
    """How often each path is covered by a bundle of the index."""
    with closing(sqlite3.connect(f"file:{index}?mode=ro", uri=True)) as connection:
        return Counter(row[0] for row in connection.execute("SELECT hash_part FROM attested"))


def in_bundles(folder: Path) -> Counter[str]:
    """How often each path stands in a bundle that the index knows."""
    with closing(sqlite3.connect(f"file:{folder}/index.sqlite?mode=ro", uri=True)) as connection:
        known = [row[0].hex() for row in connection.execute("SELECT digest FROM attestation")]
    found: Counter[str] = Counter()
    for name in known:
        data = (folder / "storage/attestations" / f"{name}.sigstore.json").read_bytes()
        payload = json.loads(Bundle.parse(data).content.payload)  # type: ignore[union-attr]
        found.update(path["storePath"] for path in payload["predicate"]["paths"])
    return found


def waiting(index: Path) -> int:
    with closing(sqlite3.connect(f"file:{index}?mode=ro", uri=True)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM waiting").fetchone()
    return int(count)


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_each_service_goes_away_during_a_run_and_all_are_signed_in_the_end(
    how: str, instance: Sigstore, tmp_path: Path, upstream: FakeCache
) -> None:
    items = entries(PATHS)
    upstream.add(*items)
    settings = keyless(instance, tmp_path) | {"batch_max_subjects": 100}
    served: list[str] = []
    failures = metric("narseal_attest_failures_total")
    async with narseal(tmp_path / "n", {"url": upstream.url}, cosign=settings) as client:

        async def clients() -> None:
            for start in range(0, PATHS, 20):
                group = items[start : start + 20]
                infos = await asyncio.gather(*(client.narinfo(item.hash) for item in group))
                answers = await asyncio.gather(*(client.get(info.url) for info in infos))
                assert {status for status, _, _ in answers} == {200}
                served.extend(item.hash for item in group)
                await asyncio.sleep(0.05)

        running = asyncio.create_task(clients())
        for service in instance.services:
            await asyncio.sleep(0.5)
            service.kill() if how == "killed" else service.freeze()
            await asyncio.sleep(2)
            if how == "killed":
                service.start()
                await asyncio.to_thread(service.wait)
            else:
                service.thaw()
        await running
        assert len(served) == PATHS
        index = tmp_path / "n/index.sqlite"
        await client.until(lambda: len(attested(index)) == PATHS)
        await client.until(lambda: metric("narseal_attest_queue") == 0)
        assert metric("narseal_attest_oldest_seconds") == 0
    assert metric("narseal_attest_failures_total") > failures
    assert set(attested(index).values()) == {1}
    found = in_bundles(tmp_path / "n")
    assert len(found) == PATHS and set(found.values()) == {1}


async def test_while_a_service_is_frozen_the_queue_grows_old_and_serving_goes_on(
    instance: Sigstore, tmp_path: Path, upstream: FakeCache
) -> None:
    items = entries(20)
    upstream.add(*items)
    async with narseal(
        tmp_path / "n", {"url": upstream.url}, cosign=keyless(instance, tmp_path)
    ) as client:
        instance.rekor.freeze()
        try:
            urls = [(await client.narinfo(item.hash)).url for item in items]
            assert [(await client.get(url))[0] for url in urls] == [200] * len(items)
            await client.until(lambda: metric("narseal_attest_oldest_seconds") > 2.5)
            await client.until(lambda: metric("narseal_attest_queue") == 20)  # all are published
            status, _, headers = await client.get(f"{urls[-1]}.sigstore.json")
            assert (status, headers["Retry-After"]) == (404, "1")
        finally:
            instance.rekor.thaw()
        await client.until(lambda: metric("narseal_attest_queue") == 0)


def rubbish(kind: str, url: str, instance: Sigstore, file: Path) -> Path:
    """A trust config one of whose services is `url`."""
    tree = json.loads(instance.trust_config_file.read_text())
    tree["signingConfig"][kind][0]["url"] = url
    file.write_text(json.dumps(tree))
    return file


ANSWERS: dict[str, Callable[[web.Request], web.Response]] = {
    "html": lambda _: web.Response(text="<html>login</html>", content_type="text/html"),
    "empty": lambda _: web.Response(),
    "error": lambda _: web.Response(status=500, text="oops"),
    "json": lambda _: web.json_response({"unexpected": [1, {}]}),
    "list": lambda _: web.json_response([]),
    "huge number": lambda _: web.json_response({"logIndex": "9" * 400}),
}


@pytest.mark.parametrize("kind", ["caUrls", "rekorTlogUrls", "tsaUrls"])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_rubbish_from_a_service_is_never_a_signature(
    kind: str, answer: str, instance: Sigstore, tmp_path: Path
) -> None:
    async def respond(request: web.Request) -> web.Response:
        return ANSWERS[answer](request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", respond)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    known = trust.load(rubbish(kind, url, instance, tmp_path / "trust.json"))
    keyless_ = KeylessSigner(instance.issuer.token, known, timeout=5)
    signers = [keyless_]
    if kind != "caUrls":
        signers.append(KeySigner(CosignKey.generate(), known, timeout=5))  # type: ignore[arg-type]
    try:
        for signer in signers:
            with pytest.raises(UpstreamTrouble):
                await asyncio.to_thread(signer.sign_digest, sha256(b"x"))
    finally:
        await runner.cleanup()


async def test_answers_of_another_entry_are_never_published(
    instance: Sigstore, tmp_path: Path
) -> None:
    """A log that answers with a true entry, of something else."""
    known = trust.load(instance.trust_config_file)
    key = CosignKey.generate()
    good = json.loads(KeySigner(key, known, timeout=10).sign_digest(sha256(b"other")))
    entry_ = good["verificationMaterial"]["tlogEntries"][0]

    async def respond(_: web.Request) -> web.Response:
        return web.json_response(entry_)

    app = web.Application()
    app.router.add_post("/api/v2/log/entries", respond)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    known = trust.load(rubbish("rekorTlogUrls", url, instance, tmp_path / "trust.json"))
    try:
        for signer in (
            KeySigner(key, known, timeout=5),
            KeylessSigner(instance.issuer.token, known, timeout=5),
        ):
            with pytest.raises(UpstreamTrouble, match="is no good"):
                await asyncio.to_thread(signer.sign_digest, sha256(b"mine"))
    finally:
        await runner.cleanup()


async def test_kill_at_any_moment_neither_loses_nor_signs_twice(
    instance: Sigstore, tmp_path: Path, upstream: FakeCache
) -> None:
    """Workers are killed over and over while they serve and sign."""
    items = entries(300)
    upstream.add(*items)
    key = tmp_path / "cosign.key"
    key.write_text(CosignKey.generate().render(b""))
    key.chmod(0o600)
    settings = QUICK | {
        "mode": "key", "key": f"file:{key}", "batch_max_subjects": 8, "log": True,
        "trust_config": str(instance.trust_config_file),
    }  # fmt: skip
    chance = random.Random(4)

    def brought(url: str, item: Entry) -> bool:
        from urllib.request import urlopen

        try:
            urlopen(f"{url}/{item.hash}.narinfo", timeout=PATIENCE).read()
            urlopen(f"{url}/{item.info.url}", timeout=PATIENCE).read()
        except OSError:
            return False
        return True

    def run(start: int, stop: int, kill_after: float | None) -> None:
        with narseal_process(tmp_path / "n", {"url": upstream.url}, cosign=settings) as proxy:
            for item in items[start:stop]:
                until(partial(brought, proxy.url, item))
                if kill_after and item is items[(start + stop) // 2]:
                    time.sleep(kill_after)
                    os.kill(proxy.workers()[0], signal.SIGKILL)
            if kill_after:
                time.sleep(chance.random())
                os.kill(proxy.process.pid, signal.SIGKILL)

    for part in range(6):
        start, stop = part * 50, (part + 1) * 50
        await asyncio.to_thread(run, start, stop, chance.random() * 0.8 if part < 5 else None)
    index = tmp_path / "n/index.sqlite"
    with narseal_process(tmp_path / "n", {"url": upstream.url}, cosign=settings) as proxy:
        for item in items:  # what was answered just before a kill may not have been kept
            assert await asyncio.to_thread(brought, proxy.url, item)
        await asyncio.to_thread(
            until, lambda: not waiting(index) and len(attested(index)) == len(items)
        )
    assert set(attested(index).values()) == {1}
    found = in_bundles(tmp_path / "n")
    assert len(found) == len(items) and set(found.values()) == {1}


async def test_one_worker_of_several_signs(
    instance: Sigstore, tmp_path: Path, upstream: FakeCache
) -> None:
    items = entries(30)
    upstream.add(*items)
    settings = keyless(instance, tmp_path)

    def run() -> None:
        from urllib.request import urlopen

        with narseal_process(
            tmp_path / "n", {"url": upstream.url}, cosign=settings, workers=2
        ) as proxy:
            for item in items:
                urlopen(f"{proxy.url}/{item.hash}.narinfo").read()
                urlopen(f"{proxy.url}/{item.info.url}").read()
            until(lambda: len(attested(tmp_path / "n/index.sqlite")) == len(items))
            body = urlopen(f"{proxy.url}/{items[0].info.url}.sigstore.json").read()
            known = trust.load(instance.trusted_root_file)
            expected = ByIdentity(IDENTITY, instance.issuer.url)
            Verifier(expected, known).verify(Bundle.parse(body), sha256(items[0].file))

    await asyncio.to_thread(run)
    assert set(attested(tmp_path / "n/index.sqlite").values()) == {1}


def test_verdict_needs_the_key_and_the_log_both(instance: Sigstore) -> None:
    """A bundle without a log entry is not enough where a trusted root asks for one."""
    key = CosignKey.generate()
    known = trust.load(instance.trusted_root_file)
    bundle = Bundle.parse(KeySigner(key, None, timeout=1).sign_digest(sha256(b"x")))
    Verifier(ByKey((key.public,)), None).verify(bundle, sha256(b"x"))
    with pytest.raises(Exception, match="no log entry"):
        Verifier(ByKey((key.public,)), known).verify(bundle, sha256(b"x"))

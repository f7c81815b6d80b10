"""Rules that ask for signatures, made after the path was admitted: the upstreams are asked for them."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from narseal.config import Config
from narseal.nix.keys import PublicKey, Signature
from narseal.nix.narinfo import MOST_BUT_OURS, NarInfo
from narseal.nix.realisation import parse_at
from narseal.pipeline.substituter import Substituter
from narseal.storage import Epoch, Revocation
from tests.faults.test_policy import guarded
from tests.tools.cache import Entry, entry, key, store_path
from tests.tools.narseal import OPERATOR, UPSTREAM, Client, metric, narseal, settings
from tests.tools.upstream import FakeCache, Gate
from tests.tools.waiting import eventually

BUILDER, OTHER = key("builder-1"), key("other-1")
APP = entry("app-1", b"app", compression="zstd")
RULE = {"match": "app-*", "require": "signature", "keys": [str(BUILDER.public)]}
RULES: dict[str, Any] = {"policy": [RULE]}


def at(upstream: FakeCache, **more: Any) -> dict[str, Any]:
    return {"url": upstream.url} | more


async def signers(client: Client, item: Entry = APP) -> set[str]:
    return {signature.key_name for signature in (await client.narinfo(item.hash)).signatures}


async def admitted(client: Client, item: Entry = APP, *, stored: bool = True) -> None:
    info = await client.narinfo(item.hash)
    if stored:
        assert (await client.get(info.url))[0] == 200
        await client.until(lambda: f"{item.hash}.narinfo" in client.published())


async def kept_back(client: Client, item: Entry) -> None:
    code, _, headers = await client.get(f"{item.hash}.narinfo")
    assert (code, headers["X-Narseal-Reason"]) == (403, "policy")


def asked(upstream: FakeCache) -> int:
    return upstream.asked[f"{APP.hash}.narinfo"]


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("evidence", ["signature", "content"])
async def test_a_younger_rule_gets_the_signatures_that_it_asks_for(
    tmp_path: Path, upstream: FakeCache, evidence: str, stored: bool
) -> None:
    there = at(upstream, verify=evidence)
    if evidence == "content":
        there["public_keys"] = []
    upstream.add(APP.signed(UPSTREAM))
    async with narseal(tmp_path, there) as client:
        await admitted(client, stored=stored)
    upstream.add(APP.signed(UPSTREAM, BUILDER))
    async with narseal(tmp_path, there, **RULES) as client:
        assert await signers(client) >= {BUILDER.public.name, OPERATOR.public.name}
        assert (await client.get((await client.narinfo(APP.hash)).url))[1] == APP.file
        await client.until(lambda: f"{APP.hash}.narinfo" in client.published())
        count = asked(upstream)
    async with narseal(tmp_path, there, **RULES) as client:  # they are kept
        assert await signers(client) >= {BUILDER.public.name}
        assert asked(upstream) == count


async def test_a_younger_rule_gets_signatures_for_an_upload(
    tmp_path: Path, upstream: FakeCache
) -> None:
    async with guarded(tmp_path, policy=[]) as pipeline:
        assert await pipeline.path(APP) == (201, "")
        await admitted(pipeline.client)
    upstream.add(APP.signed(UPSTREAM, BUILDER))
    async with guarded(tmp_path, at(upstream), policy=[RULE]) as pipeline:
        status_, _, _ = await pipeline.client.get(f"upload/{APP.hash}.narinfo")
        assert (status_, asked(upstream)) == (403, 0), "below /upload/ no upstream is asked"
        assert BUILDER.public.name in await signers(pipeline.client)
        tree = json.loads((await pipeline.client.get(f"status/{APP.info.store_path}"))[1])
        assert tree["evidence"].startswith("upload ")
        assert f"{APP.hash}.narinfo" in pipeline.client.published()


async def test_each_upstream_may_have_one_of_the_signatures(
    tmp_path: Path, upstream: FakeCache, second: FakeCache
) -> None:
    one = {"require": "signature", "keys": [str(BUILDER.public)]}
    two = {"require": "signature", "keys": [str(OTHER.public)]}
    rules = {"policy": [{"match": "app-*", "require": "all", "of": [one, two]}]}
    upstream.add(APP.signed(UPSTREAM))
    there = at(upstream, priority=1), at(second, priority=2)
    async with narseal(tmp_path, *there) as client:
        await admitted(client)
    upstream.add(APP.signed(UPSTREAM, BUILDER))
    second.add(APP.signed(UPSTREAM, OTHER))
    async with narseal(tmp_path, *there, **rules) as client:
        assert await signers(client) == {
            k.public.name for k in (UPSTREAM, BUILDER, OTHER, OPERATOR)
        }


async def test_other_content_adds_no_signature(tmp_path: Path, upstream: FakeCache) -> None:
    upstream.add(APP.signed(UPSTREAM))
    async with narseal(tmp_path, at(upstream)) as client:
        await admitted(client)
    other = entry("app-1", b"another", compression="zstd").signed(UPSTREAM, BUILDER)
    upstream.add(other)
    conflicts = metric("narseal_rejected_total", reason="conflict")
    async with narseal(tmp_path, at(upstream), **RULES) as client:
        await kept_back(client, APP)
        assert metric("narseal_rejected_total", reason="conflict") == conflicts + 1
    async with narseal(tmp_path, at(upstream)) as client:
        info = await client.narinfo(APP.hash)
        assert info.nar_hash == APP.info.nar_hash
        assert {s.key_name for s in info.signatures} == {"upstream-1", "operator-1"}


async def test_a_forged_signature_is_not_added(tmp_path: Path, upstream: FakeCache) -> None:
    upstream.add(APP.signed(UPSTREAM))
    async with narseal(tmp_path, at(upstream)) as client:
        await admitted(client)
    forged = Signature(BUILDER.public.name, BUILDER.sign(b"something else").data)
    info = APP.signed(UPSTREAM).info
    upstream.files[f"{APP.hash}.narinfo"] = info.with_signatures(
        (*info.signatures, forged)
    ).render()
    async with narseal(tmp_path, at(upstream), **RULES) as client:
        await kept_back(client, APP)
    async with narseal(tmp_path, at(upstream)) as client:
        assert await signers(client) == {"upstream-1", "operator-1"}


async def test_names_that_were_taken_keep_no_signature_out(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Before anybody knew that key here, an upstream filled the room with lines in its name."""
    info = APP.signed(UPSTREAM).info
    false = tuple(
        Signature(BUILDER.public.name, BUILDER.sign(b"%d" % n).data) for n in range(MOST_BUT_OURS)
    )
    upstream.files |= APP.files()
    upstream.files[f"{APP.hash}.narinfo"] = info.with_signatures(
        (*info.signatures, *false)
    ).render()
    async with narseal(tmp_path, at(upstream)) as client:
        await admitted(client)
    upstream.add(APP.signed(UPSTREAM, BUILDER))
    async with narseal(tmp_path, at(upstream), **RULES) as client:
        found = (await client.narinfo(APP.hash)).signatures
        assert sorted(s.key_name for s in found) == ["builder-1", "operator-1", "upstream-1"]


@pytest.mark.parametrize("how", ["without it", "absent", "down"])
async def test_the_upstreams_are_not_asked_at_every_request(
    tmp_path: Path, upstream: FakeCache, how: str
) -> None:
    upstream.add(APP.signed(UPSTREAM))
    async with narseal(tmp_path, at(upstream)) as client:
        await admitted(client)
    if how == "absent":
        del upstream.files[f"{APP.hash}.narinfo"]
    upstream.down = how == "down"
    async with narseal(tmp_path, at(upstream), **RULES, limits={"negative_ttl": "1h"}) as client:
        await kept_back(client, APP)
        count = asked(upstream)
        assert count > 1
        for _ in range(20):
            await kept_back(client, APP)
        assert asked(upstream) == count
        upstream.down = False
        upstream.add(APP.signed(UPSTREAM, BUILDER))
    async with narseal(
        tmp_path, at(upstream), **RULES, limits={"negative_ttl": "100ms"}
    ) as client:  # nor remembered for ever
        assert BUILDER.public.name in await signers(client)


async def test_those_who_ask_at_once_have_the_upstream_asked_once(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(APP.signed(UPSTREAM))
    async with narseal(tmp_path, at(upstream)) as client:
        await admitted(client)
    upstream.add(APP.signed(UPSTREAM, BUILDER))
    async with narseal(tmp_path, at(upstream), **RULES) as client:
        count, gate = asked(upstream), Gate()
        upstream.fault(f"{APP.hash}.narinfo", gate)
        answers = [asyncio.create_task(signers(client)) for _ in range(50)]
        await gate.reached.wait()
        gate.open()
        for answer in answers:
            assert BUILDER.public.name in await answer
        assert asked(upstream) == count + 1


async def test_what_is_denied_by_its_name_is_not_asked_for(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(APP.signed(UPSTREAM))
    async with narseal(tmp_path, at(upstream)) as client:
        await admitted(client)
    count = asked(upstream)
    rules = {"policy": [{"match": "app-*", "action": "deny"}]}
    async with narseal(tmp_path, at(upstream), **rules) as client:
        await kept_back(client, APP)
        assert asked(upstream) == count


async def test_a_realisation_waits_for_its_paths_signatures_and_no_longer(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Nix asks for the realisation first: 403 there, and it would never ask for the path."""
    upstream.add(APP.signed(UPSTREAM))
    name = f"build-trace-v2/{store_path('app.drv')}/out.doi"
    bare = f'{{"outPath":"{APP.info.store_path}","signatures":[]}}'.encode()
    parsed = parse_at(name, bare)
    signature = UPSTREAM.sign(parsed.fingerprint())
    upstream.files[name] = parsed.with_signatures((signature,)).render()
    async with narseal(tmp_path, at(upstream)) as client:
        await admitted(client)
        assert (await client.get(name))[0] == 200
    async with narseal(tmp_path, at(upstream), **RULES) as client:
        assert (await client.get(name))[0] == 403
    upstream.add(APP.signed(UPSTREAM, BUILDER))
    async with narseal(tmp_path, at(upstream), **RULES) as client:
        assert (await client.get(name))[0] == 200


async def test_that_signatures_cannot_be_kept_is_our_trouble_for_realisations_too(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(APP.signed(UPSTREAM))
    name = f"build-trace-v2/{store_path('app.drv')}/out.doi"
    bare = f'{{"outPath":"{APP.info.store_path}","signatures":[]}}'.encode()
    parsed = parse_at(name, bare)
    upstream.files[name] = parsed.with_signatures((UPSTREAM.sign(parsed.fingerprint()),)).render()
    async with narseal(tmp_path, at(upstream)) as client:
        await admitted(client)
        assert (await client.get(name))[0] == 200
    upstream.add(APP.signed(UPSTREAM, BUILDER))
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as index:
        index.execute(
            "CREATE TRIGGER full BEFORE UPDATE ON path BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        )
    async with narseal(tmp_path, at(upstream), **RULES, limits={"negative_ttl": "100ms"}) as client:
        assert (await client.get(name))[0] == 503
        with closing(sqlite3.connect(tmp_path / "index.sqlite")) as index:
            index.execute("DROP TRIGGER full")

        async def is_there() -> bool:
            return (await client.get(name))[0] == 200

        await eventually(is_there)


async def test_what_is_long_to_verify_is_verified_in_threads(
    tmp_path: Path, upstream: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    references = tuple(store_path(f"reference-{n}") for n in range(2000))
    wide = entry("app-1", b"app", compression="zstd", references=references)
    verifies, where = PublicKey.verifies, set[bool]()

    def watched(key: PublicKey, message: bytes, signature: Signature) -> bool:
        if len(message) > 64 << 10:
            where.add(threading.current_thread() is threading.main_thread())
        return verifies(key, message, signature)

    async def answered(client: Client, names: set[str]) -> None:
        status, body, _ = await client.get(f"{wide.hash}.narinfo")
        assert status == 200, body
        assert {s.key_name for s in NarInfo.parse(body).signatures} == names

    monkeypatch.setattr(PublicKey, "verifies", watched)
    upstream.add(wide.signed(UPSTREAM))
    async with narseal(tmp_path, at(upstream)) as client:
        await answered(client, {"upstream-1", "operator-1"})
    # a younger rule, and then an upload of one signature more
    upstream.add(wide.signed(UPSTREAM, BUILDER))
    async with guarded(tmp_path, at(upstream), policy=[RULE]) as pipeline:
        await answered(pipeline.client, {"upstream-1", "operator-1", "builder-1"})
        more = wide.signed(OTHER).info.render()
        assert (await pipeline.put(f"{wide.hash}.narinfo", more))[0] == 200
        await answered(pipeline.client, {"upstream-1", "operator-1", "builder-1", "other-1"})
    # a key that is revoked: what is left is looked for
    config = Config(**settings(tmp_path, at(upstream), policy=[RULE]))
    async with Substituter.opened(
        config, epoch=Epoch.of(config.storage.index), serving=False
    ) as substituter:
        await substituter.revoking.revoke(
            Revocation("key", OTHER.name, "", 0.0, "stolen"), lambda *_: None
        )
    async with guarded(tmp_path, at(upstream), policy=[RULE]) as pipeline:
        await answered(pipeline.client, {"upstream-1", "operator-1", "builder-1"})
    assert where == {False}

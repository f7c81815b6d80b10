"""Realisations that were withdrawn: what speaks for them again, and what does not."""

from __future__ import annotations

import json
from pathlib import Path

from narseal.nix.realisation import parse_at
from narseal.nix.store_path import StorePath
from tests.faults.test_rotation import NEW, only_new
from tests.faults.test_rule import scoped, trace
from tests.faults.test_schedules import revoke
from tests.faults.test_uploads import uploading
from tests.tools.cache import entry, key, store_path
from tests.tools.narseal import OPERATOR, UPSTREAM, narseal
from tests.tools.upstream import FakeCache

ADDRESS = f"build-trace-v2/{store_path('app.drv')}/out.doi"
LATER = key("upstream-2")
BUILDER = key("builder-1")


def signed(out: StorePath, *keys: object) -> bytes:
    entry = parse_at(ADDRESS, trace(out))
    message = entry.fingerprint()
    return entry.with_signatures(tuple(k.sign(message) for k in keys)).render()  # type: ignore[attr-defined]


async def test_the_pin_of_a_withdrawn_realisation_holds(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Nothing of it was revoked but a signature of ours: another output is no answer."""
    one, two = store_path("app"), store_path("other-app")
    upstream.files[ADDRESS] = signed(one, UPSTREAM)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        assert (await client.get(ADDRESS))[0] == 200
    there = {"url": upstream.url, "public_keys": [str(LATER.public)]}
    async with narseal(tmp_path, there) as client:
        await revoke(tmp_path, OPERATOR.name, there)()
    upstream.files[ADDRESS] = signed(two, LATER)
    signing = only_new(tmp_path)
    async with narseal(tmp_path, there, signing=signing, limits={"negative_ttl": 0}) as client:
        assert await client.refusal(ADDRESS) == "conflict"
        upstream.files[ADDRESS] = signed(one, LATER)  # who says the same is believed
        body = json.loads((await client.get(ADDRESS))[1])
        assert body["outPath"] == str(one)
        assert NEW.name in json.dumps(body["signatures"])


async def test_a_realisation_does_not_come_back_on_a_revoked_key(tmp_path: Path) -> None:
    """The token covers nothing: the path and its realisation were taken on the builder's word."""
    item = entry("app", b"1", compression="zstd").signed(BUILDER)
    realisation = signed(item.info.store_path, BUILDER)
    trusted = {"trusted_keys": [str(BUILDER.public)]}
    async with uploading(tmp_path, **trusted) as everything:
        narrow = await scoped(tmp_path, everything, "nothing-*")
        assert (await narrow.path(item))[0] == 201
        assert (await narrow.put(ADDRESS, realisation))[0] == 201
        assert (await narrow.client.get(ADDRESS))[0] == 200
        tokens = {"enabled": True, "tokens_file": str(tmp_path / "tokens")}
        await revoke(tmp_path, BUILDER.name, upload=tokens | trusted)()
        assert (await narrow.client.get(ADDRESS))[0] == 404
        assert (await narrow.put(ADDRESS, realisation))[0] == 403
        assert (await narrow.client.get(ADDRESS))[0] == 404
        # by one whose token covers it, it comes without the revoked signature
        assert (await everything.path(item))[0] == 201
        assert (await everything.put(ADDRESS, realisation))[0] == 201
        body = (await narrow.client.get(ADDRESS))[1]
        assert BUILDER.name.encode() not in body and OPERATOR.name.encode() in body

"""What lies beside a path that policy keeps back is kept back with it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from tests.faults.test_debug_info import MINE
from tests.faults.test_policy import APP, OTHER, Pipeline, attested, digest_of, guarded, kept_back
from tests.tools.cache import Entry, entry, pointer, with_debug_info
from tests.tools.command import narseal_command
from tests.tools.narseal import UPSTREAM, Client, narseal
from tests.tools.upstream import FakeCache

DEBUG = entry("my-app-debug", node=with_debug_info(MINE), compression="zstd")
POINTER = f"debuginfo/{MINE}.debug"
DENY = {"policy": [{"match": ["*-app-*"], "action": "deny"}]}


async def status_of(client: Client, item: Entry) -> dict[str, Any]:
    status, body, _ = await client.get(f"status/{item.info.store_path}")
    assert status == 200
    tree: dict[str, Any] = json.loads(body)
    return tree


async def test_debug_info_goes_where_its_nar_goes(tmp_path: Path) -> None:
    async with guarded(tmp_path) as pipeline:
        client = pipeline.client
        assert (await pipeline.put(POINTER, pointer(DEBUG, MINE)))[0] == 201
        assert await pipeline.path(DEBUG) == (201, "")
        await kept_back(client, DEBUG)
        for prefix in ("", "upload/"):
            assert (await client.get(f"{prefix}{POINTER}"))[0] == 403
            assert (await client.head(f"{prefix}{POINTER}"))[0] == 403
        assert (await pipeline.attest(digest_of(DEBUG), attested(DEBUG)))[0] == 201
        assert (await client.get(POINTER))[1] == pointer(DEBUG, MINE)


async def test_debug_info_of_an_upstream_goes_where_its_nar_goes(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """It was served before the rules changed, and is kept."""
    item = DEBUG.signed(UPSTREAM)
    upstream.add(item)
    upstream.files[POINTER] = pointer(item, MINE)
    there = {"url": upstream.url}
    async with narseal(tmp_path, there) as client:
        await client.narinfo(item.hash)
        assert (await client.get(POINTER))[0] == 200
    async with narseal(tmp_path, there, **DENY) as client:
        assert (await client.get(POINTER))[0] == 403


async def test_attestations_of_a_kept_back_path_are_kept_back(tmp_path: Path) -> None:
    """They were left while the path was served, and say what it is and who built it."""
    names = [str(APP.info.store_path), digest_of(APP)]
    async with guarded(tmp_path) as pipeline:
        for item in (APP, OTHER):
            assert await pipeline.path(item) == (201, "")
            assert (await pipeline.attest(digest_of(item), attested(item)))[0] == 201
        for name in names:
            assert (await pipeline.client.get(f"attestations/{name}"))[0] == 200
    rule = {"match": "*-app-*", "action": "deny"}
    async with guarded(tmp_path, policy=[rule]) as pipeline:
        client = pipeline.client
        for name in names:
            status, body, headers = await client.get(f"attestations/{name}")
            assert (status, headers["X-Narseal-Reason"]) == (403, "policy")
            assert b"dsseEnvelope" not in body
        assert (await client.get(f"attestations/{digest_of(OTHER)}"))[0] == 200
        # another path with the same content may be served, and so may what is said of it
        again = entry("another", b"app", compression="zstd")
        assert again.info.nar_hash == APP.info.nar_hash
        assert (await pipeline.path(again))[0] == 201
        assert (await client.get(f"attestations/{digest_of(APP)}"))[0] == 200


async def test_the_status_of_a_kept_back_path_says_no_more_than_its_403(tmp_path: Path) -> None:
    async with guarded(tmp_path) as pipeline:
        assert await pipeline.path(APP) == (201, "")
        assert await pipeline.path(OTHER) == (201, "")
        sentence = await kept_back(pipeline.client, APP)
        tree = await status_of(pipeline.client, APP)
        assert set(tree) == {"storePath", "policy"}
        assert tree["policy"]["allowed"] is False
        assert tree["policy"]["rule"] in sentence and tree["policy"]["why"] in sentence
        assert {"narHash", "evidence", "digests"} < set(await status_of(pipeline.client, OTHER))
        await _is_shown(pipeline)


async def _is_shown(pipeline: Pipeline) -> None:
    words = ("status", str(APP.info.store_path), "--from", pipeline.client.url)
    done = await asyncio.to_thread(narseal_command, *words)
    assert "kept back: policy[0]" in done.stdout and "NAR" not in done.stdout, done.stderr

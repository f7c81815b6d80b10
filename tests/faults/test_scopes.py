"""Uploads that stretch a token's scope, and signatures that crowd out better ones."""

from __future__ import annotations

import os
from pathlib import Path

from narseal.nix.keys import Signature
from narseal.nix.realisation import BuildTraceEntry
from narseal.nix.store_path import StorePath
from tests.faults.test_uploads import Uploader, add, uploading
from tests.tools.cache import Entry, entry, key, store_path
from tests.tools.narseal import UPSTREAM, narseal
from tests.tools.upstream import FakeCache

SCANNER = key("zz-scanner")
ITEM = entry("app-1", b"one", compression="zstd")


def limited(uploader: Uploader, folder: Path, *allow: str) -> Uploader:
    return Uploader(uploader.client, add(folder, *allow))


def as_if(other: Entry, name: str) -> Entry:
    """Other content, behind the hash part of `other` and under another name."""
    path = StorePath(other.info.store_path.hash_part, name)
    return entry("bait", b"not what you asked for", compression="zstd", path=path)


def junk(count: int, *names: str) -> tuple[Signature, ...]:
    return tuple(Signature(names[n % len(names)], os.urandom(64)) for n in range(count))


async def test_a_scope_covers_no_hash_part_of_an_upstreams_path(
    tmp_path: Path, upstream: FakeCache
) -> None:
    theirs = entry("openssl-3").signed(UPSTREAM)
    upstream.add(theirs)
    same = entry("app-2", b"theirs", compression="zstd").signed(UPSTREAM)
    upstream.add(same)
    async with uploading(tmp_path, {"url": upstream.url}) as whole:
        uploader = limited(whole, tmp_path, "app-*")
        status, text = await uploader.path(as_if(theirs, "app-1"))
        assert status == 409 and str(theirs.info.store_path) in text
        info = await uploader.client.narinfo(theirs.hash)
        assert info.store_path == theirs.info.store_path
        # of a path of its own the scope says enough, whoever else has it
        assert await uploader.path(entry("app-2", b"ours", compression="zstd")) == (201, "")


async def test_while_an_upstream_cannot_say_a_scoped_upload_waits(
    tmp_path: Path, upstream: FakeCache
) -> None:
    theirs = entry("openssl-3").signed(UPSTREAM)
    upstream.add(theirs)
    upstream.down = True
    async with uploading(tmp_path, {"url": upstream.url}) as whole:
        uploader = limited(whole, tmp_path, "app-*")
        assert (await uploader.path(as_if(theirs, "app-1")))[0] in (502, 503, 504)
        assert (await whole.path(as_if(theirs, "app-1")))[0] == 201


async def test_a_reference_is_a_whole_store_path(tmp_path: Path) -> None:
    dependency = entry("dep-1", b"dep", compression="zstd")
    other = StorePath(dependency.info.store_path.hash_part, "openssl-3")
    async with uploading(tmp_path) as uploader:
        assert await uploader.path(dependency) == (201, "")
        wrong = entry("app-1", str(other).encode(), compression="zstd", references=(other,))
        status, text = await uploader.path(wrong)
        assert status == 422 and f"refers to {other}, which is not here" in text
        right = entry("app-1", compression="zstd", references=(dependency.info.store_path,))
        assert await uploader.path(right) == (201, "")


async def test_nobody_signs_in_the_name_of_a_retired_key(tmp_path: Path) -> None:
    old = tmp_path / "old.secret"
    old.write_text(key("operator-0").render())
    old.chmod(0o600)
    current = tmp_path / "current.secret"
    current.write_text(key("operator-1").render())
    current.chmod(0o600)
    both = {"key": [{"url": f"file:{current}"}, {"url": f"file:{old}"}]}
    async with narseal(
        tmp_path,
        signing=both,
        upload={"enabled": True, "tokens_file": str(tmp_path / "tokens")},
    ) as client:
        assert await Uploader(client, add(tmp_path)).path(ITEM) == (201, "")
        before = (await client.narinfo(ITEM.hash)).signatures
        assert "operator-0" in {signature.key_name for signature in before}
    async with uploading(tmp_path) as uploader:
        item = ITEM.info.with_signatures(junk(24, "operator-0"))
        assert (await uploader.put(f"{ITEM.hash}.narinfo", item.render()))[0] == 200
        assert (await uploader.client.narinfo(ITEM.hash)).signatures == before


async def test_strangers_leave_room_for_a_known_keys_signature(tmp_path: Path) -> None:
    strangers = [f"a{n}" for n in range(24)]
    async with uploading(tmp_path, trusted_keys=[str(SCANNER.public)]) as uploader:
        crowded = ITEM.info.with_signatures(junk(24, *strangers))
        assert (await uploader.put(ITEM.info.url, ITEM.file))[0] == 201
        assert (await uploader.put(f"{ITEM.hash}.narinfo", crowded.render()))[0] == 201
        signed = ITEM.signed(SCANNER)
        assert await uploader.path(signed) == (200, "")
        assert signed.info.signatures[0] in (await uploader.client.narinfo(ITEM.hash)).signatures

        output = BuildTraceEntry(store_path("app-1.drv"), "out", ITEM.info.store_path)
        good = output.with_signatures((SCANNER.sign(output.fingerprint()),))
        url = f"build-trace-v2/{output.drv_path}/out.doi"
        assert (await uploader.put(url, good.render()))[0] == 201
        for n in range(3):
            more = output.with_signatures(junk(24, *(f"b{n}-{m}" for m in range(24))))
            assert (await uploader.put(url, more.render()))[0] in (200, 422)
        assert b"zz-scanner" in (await uploader.client.get(url))[1]

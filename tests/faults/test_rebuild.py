"""A lost index that is made anew from the folder: each path rests on what it rested on before."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from narseal.cosign.bundle import Bundle
from narseal.cosign.keys import CosignKey
from narseal.custody import write_private
from narseal.nix.content_address import ContentAddress, Method
from narseal.nix.keys import SecretKey
from narseal.nix.narinfo import NarInfo
from tests.faults.test_policy import attested, by_ci, digest_of, guarded
from tests.faults.test_process import fetch
from tests.faults.test_schedules import revoke
from tests.tools.cache import Entry, addressed, entry, key
from tests.tools.command import narseal_command
from tests.tools.narseal import (
    OPERATOR,
    UPSTREAM,
    narseal,
    narseal_process,
    render_toml,
    settings,
)
from tests.tools.upstream import FakeCache

OTHER = key("upstream-2")


async def filled(folder: Path, upstream: dict[str, Any], *items: Entry) -> None:
    """A folder that has these paths of an upstream, and an index that has them not."""
    async with narseal(folder, upstream) as client:
        for item in items:
            info = await client.narinfo(item.hash)
            assert (await client.get(info.url))[0] == 200
            name = f"{item.hash}.narinfo"
            await client.until(lambda name=name: name in client.published())  # type: ignore[misc]
    for file in folder.glob("index.*"):
        file.unlink()


async def rebuilt(folder: Path, upstream: dict[str, Any]) -> tuple[str, str]:
    """What `narseal index rebuild` says: of all, and of what it did not put back."""
    done = await rebuild(folder, upstream)
    return done.stdout, done.stderr


async def rebuild(
    folder: Path, *upstreams: dict[str, Any], **more: Any
) -> subprocess.CompletedProcess[str]:
    file = folder / "narseal.toml"
    file.write_text(render_toml(settings(folder, *upstreams, **more)))
    return await asyncio.to_thread(narseal_command, "index", "rebuild", "--config", file)


async def test_what_a_rebuilt_index_has_ends_with_the_upstreams_key(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """It rested on our own key then, and a stolen key of an upstream went on speaking."""
    one = entry("one", b"1", compression="zstd").signed(UPSTREAM)
    two = entry("two", b"2", compression="zstd").signed(OTHER)
    upstream.add(one, two)
    there = {"url": upstream.url, "public_keys": [str(UPSTREAM.public), str(OTHER.public)]}
    await filled(tmp_path, there, one, two)
    assert (await rebuilt(tmp_path, there))[0].startswith("put back 2 paths, 0 ")
    asked = upstream.asked.copy()
    async with narseal(tmp_path, there) as client:
        for item in (one, two):
            await client.narinfo(item.hash)
        assert upstream.asked == asked
        await revoke(tmp_path, UPSTREAM.name, there)()
        assert await client.refusal(f"{one.hash}.narinfo") == "unsigned"
        assert f"{one.hash}.narinfo" not in client.published()
        await client.narinfo(two.hash)


async def test_a_rebuilt_index_holds_a_path_to_its_content_address(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """No signature covers the CA: one that is of the bytes, and not of the path, was believed."""
    honest = addressed("source", b"contents")
    item = entry("app", b"1", compression="zstd").signed(UPSTREAM)
    upstream.add(honest, item)
    there = {"url": upstream.url}
    await filled(tmp_path, there, honest, item)
    file = tmp_path / "storage" / f"{item.hash}.narinfo"
    lie = ContentAddress(Method.NAR, item.info.nar_hash)
    file.write_bytes(file.read_bytes() + f"CA: {lie}\n".encode())
    said, failed = await rebuilt(tmp_path, there)
    assert said.startswith("put back 1 paths, 1 "), failed
    assert f"not put back: {item.hash}.narinfo" in failed and "its CA recomputes to" in failed
    upstream.down = True
    async with narseal(tmp_path, there) as client:
        assert (await client.narinfo(honest.hash)).ca == honest.info.ca
        assert (await client.get(f"{item.hash}.narinfo"))[0] == 502


ONE, TWO = (entry(name, name.encode(), compression="zstd") for name in ("one", "two"))
SECOND, THIRD = key("operator-2"), key("operator-3")


def signing(folder: Path, *keys: SecretKey) -> dict[str, Any]:
    """The configuration of some keys of the operator's."""
    files = []
    for secret in keys:
        file = folder / f"{secret.public.name}.secret"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_private(file, secret.render())
        files.append({"url": f"file:{file}"})
    return {"signing": {"key": files}}


def refused(folder: Path) -> set[str]:
    return {file.name for file in (folder / "storage/.narseal/refused").glob("*")}


def names(*items: Entry) -> set[str]:
    return {f"{item.hash}.narinfo" for item in items}


async def brought(folder: Path, upstream: FakeCache, *keys: SecretKey) -> None:
    """A folder with ONE and TWO, which only the operator's keys signed, and no index."""
    upstream.add(ONE, TWO)
    there = {"url": upstream.url, "public_keys": [], "verify": "content"}
    async with narseal(folder, there, **signing(folder, *keys)) as client:
        for item in (ONE, TWO):
            status, body, _ = await client.get(f"{item.hash}.narinfo")
            assert status == 200
            assert (await client.get(NarInfo.parse(body).url))[0] == 200
        await client.until(lambda: names(ONE, TWO) <= client.published())
    for file in folder.glob("index.*"):
        file.unlink()


async def test_what_was_refused_is_seen_no_more_and_comes_back_with_the_right_key(
    tmp_path: Path, upstream: FakeCache
) -> None:
    await brought(tmp_path, upstream, OPERATOR)
    done = await rebuild(tmp_path, **signing(tmp_path, SECOND))
    assert done.returncode == 1
    assert done.stdout.startswith("put back no paths, 2 could not be")
    assert f"{tmp_path}/storage/.narseal/refused" in done.stdout
    assert "[[signing.key]]" in done.stderr and done.stderr.count("not put back: ") == 2
    assert refused(tmp_path) == names(ONE, TWO)
    again = await rebuild(tmp_path, **signing(tmp_path, SECOND))  # neither forgotten nor put back
    assert again.stdout == done.stdout and refused(tmp_path) == names(ONE, TWO)
    with narseal_process(tmp_path, **signing(tmp_path, SECOND)) as proxy:  # it can begin
        assert (await asyncio.to_thread(fetch, f"{proxy.url}/{ONE.hash}.narinfo"))[0] == 404
    assert not list((tmp_path / "storage").glob("*.narinfo"))
    done = await rebuild(tmp_path, **signing(tmp_path, OPERATOR))
    assert (done.returncode, done.stdout) == (0, "put back 2 paths, 0 could not be\n")
    assert refused(tmp_path) == set()
    async with narseal(tmp_path) as client:
        assert names(ONE, TWO) <= client.published()
        for item in (ONE, TWO):
            assert (await client.narinfo(item.hash)).nar_hash == item.info.nar_hash


async def test_only_what_was_refused_is_set_aside(tmp_path: Path, upstream: FakeCache) -> None:
    await brought(tmp_path, upstream, OPERATOR)
    file = tmp_path / "storage" / f"{TWO.hash}.narinfo"
    nar = tmp_path / "storage" / NarInfo.parse(file.read_bytes()).url
    nar.write_bytes(nar.read_bytes()[:-1])
    done = await rebuild(tmp_path)
    assert done.returncode == 1 and done.stdout.startswith("put back 1 paths, 1 could not be")
    assert refused(tmp_path) == names(TWO) and not file.exists()
    async with narseal(tmp_path) as client:
        await client.narinfo(ONE.hash)
        assert await client.refusal(f"{TWO.hash}.narinfo") == "absent"
        assert names(ONE) <= client.published()


async def test_the_folder_shows_what_was_verified(tmp_path: Path, upstream: FakeCache) -> None:
    """Not what else stood in the file: signatures that are not good, a name that is not the NAR's."""
    await brought(tmp_path, upstream, OPERATOR)
    file = tmp_path / "storage" / f"{ONE.hash}.narinfo"
    good = file.read_bytes()
    forged = SECOND.sign(b"another text")
    file.write_bytes(good + f"Sig: {forged}\n".encode())
    done = await rebuild(tmp_path, **signing(tmp_path, OPERATOR, SECOND))
    assert done.returncode == 0, done.stderr
    assert file.read_bytes() == good


async def test_there_is_nothing_to_put_back(tmp_path: Path, upstream: FakeCache) -> None:
    done = await rebuild(tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("nothing to put back: ") and "has no narinfos" in done.stdout
    await brought(tmp_path, upstream, OPERATOR)
    await asyncio.to_thread((tmp_path / "storage/.narseal/refused").mkdir, exist_ok=True)
    assert (await rebuild(tmp_path)).stdout == "put back 2 paths, 0 could not be\n"
    done = await rebuild(tmp_path)
    assert done.returncode == 0 and "the index has all 2 paths" in done.stdout


async def test_a_path_of_two_keys_is_withdrawn_with_the_last_of_them(
    tmp_path: Path, upstream: FakeCache
) -> None:
    await brought(tmp_path, upstream, OPERATOR, SECOND)
    both = signing(tmp_path, OPERATOR, SECOND, THIRD)
    assert (await rebuild(tmp_path, **both)).returncode == 0
    for file in (tmp_path / "storage").glob("*.narinfo"):
        signers = {s.key_name for s in NarInfo.parse(file.read_bytes()).signatures}
        assert signers == {OPERATOR.name, SECOND.name}
    async with narseal(tmp_path, **both) as client:
        await revoke(tmp_path, OPERATOR.name, **both)()
        for item in (ONE, TWO):
            status, body, _ = await client.get(f"{item.hash}.narinfo")
            assert status == 200
            signers = {s.key_name for s in NarInfo.parse(body).signatures}
            assert SECOND.name in signers and OPERATOR.name not in signers
        assert names(ONE, TWO) <= client.published()
        await revoke(tmp_path, SECOND.name, **both)()
        for item in (ONE, TWO):
            assert (await client.get(f"{item.hash}.narinfo"))[0] == 404
        assert not names(ONE, TWO) & client.published()


async def test_a_revoked_key_bars_nothing_that_another_signed(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """An index from a backup knows what was revoked; the narinfo still bears both signatures."""
    await brought(tmp_path, upstream, OPERATOR, SECOND)
    both = signing(tmp_path, OPERATOR, SECOND)
    files = {file: file.read_bytes() for file in (tmp_path / "storage").glob("*.narinfo")}
    assert (await rebuild(tmp_path, **both)).returncode == 0
    await revoke(tmp_path, OPERATOR.name, **both)()
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as index:
        index.execute("DELETE FROM path")
        index.execute("DELETE FROM nar")
        index.commit()
    for file, data in files.items():
        file.write_bytes(data)
    done = await rebuild(tmp_path, **both)
    assert (done.returncode, done.stdout) == (0, "put back 2 paths, 0 could not be\n"), done.stderr
    for file in files:
        signers = {s.key_name for s in NarInfo.parse(file.read_bytes()).signatures}
        assert signers == {SECOND.name}
    await revoke(tmp_path, SECOND.name, **signing(tmp_path, SECOND, THIRD))()
    async with narseal(tmp_path, **signing(tmp_path, SECOND, THIRD)) as client:
        assert (await client.get(f"{ONE.hash}.narinfo"))[0] == 404


async def test_what_was_withdrawn_is_not_put_back(tmp_path: Path, upstream: FakeCache) -> None:
    """On whose word it was is not known any more: ours may have been given for another's."""
    item = entry("app", b"1", compression="zstd").signed(UPSTREAM)
    upstream.add(item)
    there = {"url": upstream.url}
    file = tmp_path / "storage" / f"{item.hash}.narinfo"
    async with narseal(tmp_path, there) as client:
        info = await client.narinfo(item.hash)
        assert (await client.get(info.url))[0] == 200
        await client.until(file.exists)
        data = file.read_bytes()
    await revoke(tmp_path, UPSTREAM.name, there)()
    assert not file.exists()
    file.write_bytes(data)  # a crash, or a backup of the folder
    done = await rebuild(tmp_path, there)
    assert done.returncode == 1 and "was withdrawn" in done.stderr
    assert refused(tmp_path) == names(item) and not file.exists()


async def test_what_policy_keeps_back_is_not_shown(tmp_path: Path, upstream: FakeCache) -> None:
    """It was, until the next start."""
    await brought(tmp_path, upstream, OPERATOR)
    denied = {"policy": [{"match": ["one"], "action": "deny"}]}
    done = await rebuild(tmp_path, **denied)
    assert (done.returncode, done.stdout) == (0, "put back 2 paths, 0 could not be\n"), done.stderr
    shown = {file.name for file in (tmp_path / "storage").glob("*.narinfo")}
    assert shown == names(TWO)
    async with narseal(tmp_path) as client:  # without the rule it is shown
        assert (await client.narinfo(ONE.hash)).nar_hash == ONE.info.nar_hash
        await client.until(lambda: names(ONE, TWO) <= client.published())


async def test_what_others_attested_is_taken_again(tmp_path: Path) -> None:
    """It was forgotten, and with it what policy lets through by it."""
    item, denied = entry("my-app-1", compression="zstd"), entry("my-app-2", compression="zstd")
    rules: dict[str, Any] = {"policy": [by_ci() | {"match": "*-app-*"}]}
    async with guarded(tmp_path, policy=rules["policy"]) as pipeline:
        assert (await pipeline.path(item))[0] == (await pipeline.path(denied))[0] == 201
        assert (await pipeline.attest(digest_of(item), attested(item)))[0] == 201
        await pipeline.client.narinfo(item.hash)
        await pipeline.client.until(lambda: names(item) <= pipeline.client.published())
    for file in tmp_path.glob("index.*"):
        file.unlink()
    strange = tmp_path / "storage/attestations" / f"{'0' * 64}.sigstore.json"
    strange.write_bytes(attested(denied))  # not its name
    stranger = CosignKey.generate()
    by_none = Bundle.parse(attested(denied, by=stranger)).render()
    (strange.parent / f"{hashlib.sha256(by_none).hexdigest()}.sigstore.json").write_bytes(by_none)
    done = await rebuild(tmp_path, **rules)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "put back 1 paths, 0 could not be\ntook 1 attestations again that others had left\n"
    )
    assert f"1 NAR files have no narinfo, {denied.info.url} for one" in done.stderr
    async with narseal(tmp_path, **rules) as client:
        await client.narinfo(item.hash)
        await client.refusal(f"{denied.hash}.narinfo")


@pytest.mark.parametrize("error", ["EIO", "EMFILE", "EACCES"])
async def test_a_fault_of_the_disk_refuses_nothing(
    error: str, tmp_path: Path, upstream: FakeCache
) -> None:
    """Its narinfo was set aside, as if the file were wrong."""
    await brought(tmp_path, upstream, OPERATOR)
    file = tmp_path / "storage" / f"{TWO.hash}.narinfo"
    nar = tmp_path / "storage" / NarInfo.parse(file.read_bytes()).url
    config = tmp_path / "narseal.toml"
    config.write_text(render_toml(settings(tmp_path)))
    done = await asyncio.to_thread(
        subprocess.run,
        [
            *("strace", "-f", "-P", str(nar), "-e", "trace=openat"),
            *("-e", f"inject=openat:error={error}", "-o", "/dev/null"),
            *(sys.executable, "-m", "narseal", "index", "rebuild", "--config", str(config)),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == "put back 1 paths, 1 could not be\n"
    assert f"not put back: {TWO.hash}.narinfo: storage fails" in done.stderr
    assert "run it again" in done.stderr
    assert refused(tmp_path) == set() and file.exists()
    done = await rebuild(tmp_path)
    assert (done.returncode, done.stdout) == (0, "put back 1 paths, 0 could not be\n")


async def test_a_fault_of_the_disk_is_one_of_the_problems(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """`index check` ended with a traceback, and said nothing of the files after it."""
    await brought(tmp_path, upstream, OPERATOR)
    assert (await rebuild(tmp_path)).returncode == 0
    storage = tmp_path / "storage"
    nar = storage / NarInfo.parse((storage / f"{TWO.hash}.narinfo").read_bytes()).url
    config = tmp_path / "narseal.toml"
    done = await asyncio.to_thread(
        subprocess.run,
        [
            *("strace", "-f", "-P", str(nar), "-e", "trace=read"),
            *("-e", "inject=read:error=EIO", "-o", "/dev/null"),
            *(sys.executable, "-m", "narseal", "index", "check", "--content"),
            *("--config", str(config)),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"nar/{nar.name} cannot be read: storage fails" in done.stderr
    assert done.stdout == "1 problems\n"


async def test_what_is_no_file_is_passed_by(tmp_path: Path, upstream: FakeCache) -> None:
    """A pipe was waited for, and a folder ended the work with a traceback."""
    one = entry("one", b"1", compression="none").signed(UPSTREAM)
    two = entry("two", b"2", compression="none").signed(UPSTREAM)
    three = entry("three", b"3", compression="none").signed(UPSTREAM)
    upstream.add(one, two, three)
    there = {"url": upstream.url}
    await filled(tmp_path, there, one, two, three)
    storage = tmp_path / "storage"
    (storage / two.info.url).unlink()
    os.mkfifo(storage / two.info.url)
    (storage / three.info.url).unlink()
    (storage / three.info.url).mkdir()
    os.mkfifo(storage / f"{'0' * 32}.narinfo")
    (storage / f"{'1' * 32}.narinfo").mkdir()
    (storage / os.fsdecode(b"\xff.narinfo")).touch()
    (storage / f"{'2' * 32}.narinfo").symlink_to(storage / f"{one.hash}.narinfo")
    done = await rebuild(tmp_path, there)
    assert done.returncode == 1
    assert done.stdout.startswith("put back 1 paths, 5 ")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("not a regular file") == 5

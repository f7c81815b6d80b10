"""A lost index that is made anew from the folder: each path rests on what it rested on before."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from narseal.nix.content_address import ContentAddress, Method
from tests.faults.test_schedules import revoke
from tests.tools.cache import Entry, addressed, entry, key
from tests.tools.command import narseal_command
from tests.tools.narseal import UPSTREAM, narseal, render_toml, settings
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
    file = folder / "narseal.toml"
    file.write_text(render_toml(settings(folder, upstream)))
    done = await asyncio.to_thread(narseal_command, "index", "rebuild", "--config", file)
    return done.stdout, done.stderr


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

"""Bounds, scopes and owners of what is uploaded, each at its edge."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_schedules import revoke
from tests.faults.test_uploads import ITEM, OTHER, Uploader, add, uploading
from tests.tools.cache import Entry, entry, key, pointer, store_path, with_debug_info
from tests.tools.narseal import OPERATOR, UPSTREAM, narseal, unclaimed
from tests.tools.upstream import FakeCache
from tests.tools.waiting import PATIENCE, eventually

LISTING = b'{"version":1,"root":{"type":"regular","size":1}}'
BUILD_ID = "a" * 40
DEBUG = f"debuginfo/{BUILD_ID}.debug"
BUILDER = key("builder-1")


def another(uploader: Uploader, token: str) -> Uploader:
    """Somebody with a token of his own, which was there before narseal."""
    return Uploader(uploader.client, token)


async def names(uploader: Uploader, item: Entry) -> set[str]:
    return {s.key_name for s in (await uploader.client.narinfo(item.hash)).signatures}


def of_size(nar_size: int) -> Entry:
    """A path whose NAR has just so many bytes, and whose file has few."""
    empty = entry("sized", b"", compression="zstd").info.nar_size
    item = entry("sized", bytes(nar_size - empty), compression="zstd")
    assert item.info.nar_size == nar_size
    return item


@asynccontextmanager
async def bounded(
    folder: Path, upload: dict[str, Any], limits: dict[str, Any]
) -> AsyncIterator[Uploader]:
    folder.mkdir()
    upload |= {"enabled": True, "tokens_file": str(folder / "tokens")}
    token = add(folder)
    async with narseal(folder, upload=upload, limits=limits) as client:
        yield Uploader(client, token)


@pytest.mark.parametrize(
    ("upload", "limits", "bound"),
    [({"nar_size": 1024}, {}, 64 << 10), ({}, {"nar_size": 8192}, 8192)],
)
async def test_an_uploaded_nar_has_two_bounds(
    upload: dict[str, Any], limits: dict[str, Any], bound: int, tmp_path: Path
) -> None:
    """That of all NARs, and 64 times that of an uploaded file."""
    for size, expected in ((bound, 201), (bound + 8, 422)):
        item = of_size(size)
        async with bounded(tmp_path / str(size), dict(upload), limits) as uploader:
            status, text = await uploader.path(item)
            assert (status, "is too large" in text) == (expected, expected == 422), text
            assert (await uploader.client.get(f"{item.hash}.narinfo"))[0] == (
                200 if expected == 201 else 404
            )


@pytest.mark.parametrize("sized", [True, False])
async def test_an_uploaded_file_may_be_as_large_as_its_bound(tmp_path: Path, sized: bool) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(ITEM.file), 50):
            yield ITEM.file[at : at + 50]

    for less, expected in ((0, 201), (1, 413)):
        bound = {"nar_size": len(ITEM.file) - less}
        async with uploading(tmp_path / str(less), **bound) as uploader:
            body = ITEM.file if sized else chunks()
            assert (await uploader.put(ITEM.info.url, body))[0] == expected


async def test_who_announces_more_than_there_is_room_for_is_told_before_he_sends_it(
    tmp_path: Path,
) -> None:
    async with uploading(tmp_path, quarantine_size="8K") as uploader:
        host, port = uploader.client.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            f"PUT /{ITEM.info.url} HTTP/1.1\r\nHost: x\r\nContent-Length: 8193\r\n"
            f"Authorization: {uploader.headers['Authorization']}\r\n\r\n".encode()
        )
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), PATIENCE)
        assert answer.startswith(b"HTTP/1.1 507")
        writer.close()


async def test_a_trusted_signature_brings_no_strangers_along(tmp_path: Path) -> None:
    """It lets in a path that its token does not cover, and nothing else of that token's."""
    token = add(tmp_path, "nothing-*")
    async with uploading(tmp_path, trusted_keys=[str(BUILDER.public)]) as owner:
        assert (await owner.path(OTHER))[0] == 201
        limited = another(owner, token)
        both = OTHER.signed(BUILDER, key("stranger-1"))
        assert (await limited.path(both))[0] == 200
        assert await names(owner, OTHER) == {OPERATOR.name, BUILDER.name}
        assert (await owner.path(both))[0] == 200
        assert await names(owner, OTHER) == {OPERATOR.name, BUILDER.name, "stranger-1"}


async def test_a_signature_that_is_added_is_in_the_next_answer(tmp_path: Path) -> None:
    async with uploading(tmp_path) as uploader:
        assert (await uploader.path(ITEM))[0] == 201
        for number in range(3):
            assert len(await names(uploader, ITEM)) == 1 + number
            assert len(await names(uploader, ITEM)) == 1 + number  # ready in memory now
            more = ITEM.signed(key(f"stranger-{number}"))
            assert (await uploader.put(f"{ITEM.hash}.narinfo", more.info.render()))[0] == 200


async def test_a_path_may_refer_to_itself(tmp_path: Path) -> None:
    own = store_path("self")
    item = entry("self", own.full("/nix/store").encode(), references=(own,), compression="zstd")
    async with uploading(tmp_path, references="refuse") as uploader:
        assert await uploader.path(item) == (201, "")
        assert tuple((await uploader.client.narinfo(item.hash)).references) == (own,)


async def test_what_an_upstream_only_announces_is_not_here_yet(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Another path with the very file was admitted, and nobody fetched it."""
    theirs = entry("theirs", b"uploaded", compression="zstd").signed(UPSTREAM)
    assert theirs.info.url == ITEM.info.url
    upstream.add(theirs)
    async with uploading(tmp_path, {"url": upstream.url}) as uploader:
        await uploader.client.narinfo(theirs.hash)
        status, text = await uploader.put(f"{ITEM.hash}.narinfo", ITEM.info.render())
        assert (status, "upload it before its narinfo" in text) == (422, True)
        assert await uploader.path(ITEM) == (201, "")
        info = await uploader.client.narinfo(ITEM.hash)
        upstream.down = True
        assert (await uploader.client.get(info.url))[1] == ITEM.file


async def test_a_signature_by_a_revoked_key_comes_off_and_bars_nothing(
    tmp_path: Path, upstream: FakeCache
) -> None:
    there = {"url": upstream.url}
    async with uploading(tmp_path, there) as uploader:
        await revoke(tmp_path, UPSTREAM.name, there)()
        assert await uploader.path(ITEM.signed(UPSTREAM, BUILDER)) == (201, "")
        assert await names(uploader, ITEM) == {OPERATOR.name, BUILDER.name}


async def test_a_lost_path_is_brought_again_as_it_was_and_not_otherwise(tmp_path: Path) -> None:
    other = entry("my-app-1", b"something else", compression="zstd")
    assert other.hash == ITEM.hash
    async with uploading(tmp_path) as uploader:
        client = uploader.client
        assert (await uploader.path(ITEM))[0] == 201
        info = await client.narinfo(ITEM.hash)
        (client.storage / info.url).unlink()

        async def is_lost() -> bool:
            await client.get(info.url)
            return (await client.get(f"{ITEM.hash}.narinfo"))[0] == 404

        await eventually(is_lost)
        status, text = await uploader.path(other)
        assert (status, "the pin holds" in text) == (409, True), text
        assert await uploader.path(ITEM) == (201, "")
        assert (await client.get(info.url))[1] == ITEM.file


async def test_a_log_is_its_derivations_by_name(tmp_path: Path) -> None:
    token = add(tmp_path, "my-app-1")
    async with uploading(tmp_path) as owner:
        uploader = another(owner, token)
        assert (await uploader.put(f"log/{store_path('my-app-1.drv')}", b"built"))[0] == 201
        for name in ("my-app-2.drv", "x-my-app-1.drv", "my-app-1.drv.drv", "my-app-1-dev.drv"):
            assert (await uploader.put(f"log/{store_path(name)}", b"built"))[0] == 403


async def test_who_may_bring_no_path_vouches_for_no_side_files(tmp_path: Path) -> None:
    """The narinfo is let in by its signature, which says nothing of the listing beside it."""
    token = add(tmp_path, "nothing-*")
    async with uploading(tmp_path, trusted_keys=[str(BUILDER.public)]) as owner:
        limited = another(owner, token)
        assert (await limited.put(f"{OTHER.hash}.ls", LISTING))[0] == 201
        assert (await limited.path(OTHER.signed(BUILDER)))[0] == 201
        assert (await owner.client.get(f"{OTHER.hash}.ls"))[0] == 404
        assert (await owner.put(f"{OTHER.hash}.ls", LISTING))[0] == 201
        assert (await owner.client.get(f"{OTHER.hash}.ls"))[1] == LISTING


async def test_what_waited_does_not_take_the_place_of_what_came_first(tmp_path: Path) -> None:
    token = add(tmp_path, "*")
    one, other = (
        entry(name, node=with_debug_info(BUILD_ID, name), compression="zstd")
        for name in ("one-debug", "other-debug")
    )
    async with uploading(tmp_path) as first:
        second = another(first, token)
        assert (await first.put(DEBUG, pointer(one, BUILD_ID)))[0] == 201
        assert (await second.put(DEBUG, pointer(other, BUILD_ID)))[0] == 201
        assert (await second.path(other))[0] == 201
        assert (await first.path(one))[0] == 201
        assert (await first.client.get(DEBUG))[1] == pointer(other, BUILD_ID)
        assert not unclaimed(first.client.storage)


async def test_debug_info_leads_to_the_name_that_its_nar_got(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """An upstream's lie got the name of the uploaded file meanwhile."""
    item = entry("my-app-debug", node=with_debug_info(BUILD_ID), compression="zstd")
    lie = entry("lie-1", b"lie", compression="zstd").signed(UPSTREAM)
    lie = lie.but(file_hash=item.info.file_hash, file_size=item.info.file_size, url=item.info.url)
    upstream.add(lie)
    async with uploading(tmp_path, {"url": upstream.url}) as uploader:
        assert (await uploader.put(DEBUG, pointer(item, BUILD_ID)))[0] == 201
        await uploader.client.narinfo(lie.hash)
        assert (await uploader.path(item))[0] == 201
        info = await uploader.client.narinfo(item.hash)
        assert info.url != item.info.url
        found = json.loads((await uploader.client.get(DEBUG))[1])
        assert found["archive"] == f"../{info.url}"


async def test_side_files_that_wait_are_bounded(tmp_path: Path) -> None:
    async with uploading(tmp_path, quarantine_size="8K") as uploader:
        large = LISTING + b" " * (8193 - len(LISTING))
        assert (await uploader.put(f"{ITEM.hash}.ls", large))[0] == 507
        assert (await uploader.put(f"{ITEM.hash}.ls", large[:8192]))[0] == 201
        assert (await uploader.put(f"{OTHER.hash}.ls", LISTING))[0] == 507


async def test_so_many_side_files_of_one_token_wait_and_no_more(tmp_path: Path) -> None:
    token = add(tmp_path, "*")
    async with uploading(tmp_path) as first:
        assert (await first.put(f"{ITEM.hash}.ls", LISTING))[0] == 201
        (waiting,) = (first.client.storage / ".narseal/waiting").iterdir()
        (one,) = waiting.iterdir()
        for number in range(2047):
            (waiting / one.name.replace(ITEM.hash, f"{number:032}")).touch()
        assert (await first.put(f"{OTHER.hash}.ls", LISTING))[0] == 507
        second = another(first, token)
        assert (await second.put(f"{OTHER.hash}.ls", LISTING))[0] == 201
        next(waiting.glob("0*.ls")).unlink()
        assert (await first.put(f"{OTHER.hash}.ls", LISTING))[0] == 201

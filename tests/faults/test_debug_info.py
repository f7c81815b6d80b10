"""Debug-info pointers: whose they are, and what they may point to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.test_uploads import uploading
from tests.tools.cache import entry, pointer, with_debug_info
from tests.tools.narseal import unclaimed

MINE, FOREIGN, LINK = "a" * 40, "b" * 40, "0" * 40
ITEM = entry("my-app-debug", node=with_debug_info(MINE), compression="zstd")


@pytest.mark.parametrize("suffix", ["", ".debug"])
@pytest.mark.parametrize("first", ["the path", "the pointer"])
async def test_a_build_id_must_be_in_the_nar(first: str, suffix: str, tmp_path: Path) -> None:
    """Any build id could be claimed by who brought any path; a link is no debug info of its own."""
    async with uploading(tmp_path) as uploader:
        client = uploader.client
        if first == "the path":
            assert await uploader.path(ITEM) == (201, "")
        answers = {
            build_id: (
                await uploader.put(f"debuginfo/{build_id}{suffix}", pointer(ITEM, build_id))
            )[0]
            for build_id in (MINE, FOREIGN, LINK)
        }
        if first == "the pointer":  # it waits, and nobody sees it
            assert set(answers.values()) == {201}
            assert await uploader.path(ITEM) == (201, "")
        else:
            assert answers == {MINE: 201, FOREIGN: 422, LINK: 422}
        assert (await client.get(f"debuginfo/{MINE}{suffix}"))[1] == pointer(ITEM, MINE)
        for build_id in (FOREIGN, LINK):
            assert (await client.get(f"debuginfo/{build_id}{suffix}"))[0] == 404
        assert not unclaimed(client.storage)


@pytest.mark.parametrize(
    "archive",
    ["https://evil.example/{}", "../../{}", "../{}/more", "../{}?x", "../{}\n"],
)
async def test_a_pointer_names_a_file_of_this_cache(archive: str, tmp_path: Path) -> None:
    member = f"lib/debug/.build-id/{MINE[:2]}/{MINE[2:]}.debug"
    text = json.dumps({"archive": archive.format(ITEM.info.url), "member": member}).encode()
    async with uploading(tmp_path) as uploader:
        status, said = await uploader.put(f"debuginfo/{MINE}.debug", text)
        assert (status, "of this cache" in said) == (422, True), said


@pytest.mark.parametrize(
    "member",
    ["m", f"/lib/debug/.build-id/aa/{'a' * 38}.debug", f"lib/debug/.build-id/bb/{'b' * 38}.debug",
     f"lib/debug/.build-id/aa/../aa/{'a' * 38}.debug"],
)  # fmt: skip
async def test_a_pointer_names_the_file_of_its_build_id(member: str, tmp_path: Path) -> None:
    text = json.dumps({"archive": f"../{ITEM.info.url}", "member": member}).encode()
    async with uploading(tmp_path) as uploader:
        status, said = await uploader.put(f"debuginfo/{MINE}.debug", text)
        assert (status, "is not lib/debug/.build-id/aa/" in said) == (422, True)

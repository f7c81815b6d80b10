"""The signatures of rows: united, taken away by name, and never a revoked key's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from narseal.errors import BadUpload, NotFound
from narseal.nix.keys import Signature
from narseal.nix.narinfo import MAX_SIGNATURES
from narseal.storage import Index, NarRecord, PathRecord, Revocation, migrate
from tests.tools.cache import entry, key

ITEM = entry("app", b"1")
HASH = ITEM.hash
NAMES = ("a-1", "a-10", "a", "b_1", "bx1")


def by(name: str, number: int = 0) -> Signature:
    return Signature(name, key(name).sign(b"%d" % number).data)


@asynccontextmanager
async def index(folder: Path) -> AsyncIterator[Index]:
    """An index with one path, signed by `a-1`."""
    url = f"sqlite:///{folder}/index.sqlite"
    migrate(url)
    found = Index(url, "/nix/store")
    running = asyncio.create_task(found.run())
    try:
        info = ITEM.info.with_signatures((by("a-1"),))
        nar = NarRecord.of(info, "https://u")
        await found.admit(PathRecord(info, nar.file, "signature a-1", ours=frozenset({"a-1"})), nar)
        yield found
    finally:
        await found.close()
        await running


async def test_signatures_are_united_and_dropped(tmp_path: Path) -> None:
    async with index(tmp_path) as found:
        signed, ours = await found.paths.sign(HASH, [by("b_1")], ours=["b_1"])
        assert (set(signed), ours) == ({by("a-1"), by("b_1")}, frozenset({"a-1", "b_1"}))
        signed, ours = await found.paths.sign(HASH, [by("a")], drop=[by("b_1")])
        assert (set(signed), ours) == ({by("a-1"), by("a")}, frozenset({"a-1", "b_1"}))
        admitted = await found.path(HASH)
        assert admitted and set(admitted[0].signatures) == set(signed)
        with pytest.raises(NotFound):
            await found.paths.sign("0" * 32, [by("a")])


async def test_what_is_revoked_is_never_written(tmp_path: Path) -> None:
    async with index(tmp_path) as found:
        await found.paths.sign(HASH, [by("b_1")], ours=["b_1"])
        await found.revocations.add(Revocation("key", "b_1", "", 0.0, "stolen"))
        signed, ours = await found.paths.sign(HASH, [by("b_1", 2), by("bx1")], ours=["b_1"])
        assert (set(signed), ours) == ({by("a-1"), by("bx1")}, frozenset({"a-1"}))


async def test_rows_are_found_by_whole_names(tmp_path: Path) -> None:
    async with index(tmp_path) as found:
        await found.paths.sign(HASH, [by("b_1")], ours=["b_1"])

        async def signed_by(name: str) -> bool:
            return await found.paths.signed_by(name, after="", limit=9) == [HASH]

        async def lacks(*names: str) -> bool:
            rows = await found.paths.lacking(names, after="", limit=9)
            assert await found.paths.count_lacking(names) == len(rows)
            return rows == [HASH]

        assert [name for name in NAMES if await signed_by(name)] == ["a-1", "b_1"]
        assert [name for name in NAMES if not await lacks(name)] == ["a-1", "b_1"]
        assert await lacks("a-1", "a") and not await lacks("a-1", "b_1")
        assert await found.paths.lacking(["a"], after=HASH, limit=9) == []
        await found.paths.withdraw(HASH)
        assert not await lacks("a")
        assert await signed_by("a-1")
        admitted = await found.path(HASH)
        assert admitted and admitted[0].withdrawn


async def test_as_many_signatures_as_a_narinfo_may_have(tmp_path: Path) -> None:
    async with index(tmp_path) as found:
        most = [by("m", n) for n in range(MAX_SIGNATURES - 1)]
        signed, _ = await found.paths.sign(HASH, most)
        assert len(signed) == MAX_SIGNATURES
        # ours have room before others', and uploaders bring no more than leaves some
        signed, ours = await found.paths.sign(HASH, [by("z-1")], ours=["z-1"])
        assert len(signed) == MAX_SIGNATURES and by("z-1") in signed and "z-1" in ours
        with pytest.raises(BadUpload, match="too many signatures"):
            await found.paths.sign(HASH, [by("n")], is_upload=True)

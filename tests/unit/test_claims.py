"""The signatures of rows: united, taken away by name, and never a revoked key's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from narseal.errors import BadUpload, NotFound, Unavailable
from narseal.nix.keys import Signature
from narseal.nix.narinfo import MAX_SIGNATURES, MOST_BUT_OURS
from narseal.storage import Epoch, Index, NarRecord, PathRecord, Revocation, still_says
from narseal.storage.claims import Brought, Signing
from tests.tools.cache import entry, key
from tests.tools.index import index as empty_index

ITEM = entry("app", b"1")
HASH = ITEM.hash
NAMES = ("a-1", "a-10", "a", "b_1", "bx1")


def by(name: str, number: int = 0) -> Signature:
    return Signature(name, key(name).sign(b"%d" % number).data)


async def nobody(signatures: Iterable[Signature]) -> tuple[Signature, ...]:
    return ()


@asynccontextmanager
async def index(folder: Path, *, attest: bool = False) -> AsyncIterator[Index]:
    """An index with one path, signed by `a-1`."""
    async with empty_index(folder, attest=attest) as found:
        info = ITEM.info.with_signatures((by("a-1"),))
        nar = NarRecord.of(info, "https://u")
        await found.admit(PathRecord(info, nar.file, "signature a-1", ours=frozenset({"a-1"})), nar)
        yield found


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
            await found.paths.sign(HASH, [by("n")], verified=nobody)


async def test_how_many_signatures_uploads_may_leave(tmp_path: Path) -> None:
    async with index(tmp_path) as found:
        others = [by("m", n) for n in range(MOST_BUT_OURS)]
        signed, _ = await found.paths.sign(HASH, others, verified=nobody)
        assert set(signed) == {by("a-1"), *others}
        for more in ([by("n")], [by("m", MOST_BUT_OURS)]):
            with pytest.raises(BadUpload, match="too many signatures"):
                await found.paths.sign(HASH, more, verified=nobody)
        admitted = await found.path(HASH)
        assert admitted and set(admitted[0].signatures) == {by("a-1"), *others}
        # ours are not an uploader's, however many there are
        signed, _ = await found.paths.sign(HASH, [by("z-1")], ours=["z-1"])
        assert by("z-1") in signed


async def test_an_upload_takes_room_from_strangers_for_who_is_known_and_no_name_of_ours(
    tmp_path: Path,
) -> None:
    async def known(signatures: Iterable[Signature]) -> list[Signature]:
        return [signature for signature in signatures if signature.key_name == "z"]

    async with index(tmp_path) as found:
        strangers = [by("m", n) for n in range(MOST_BUT_OURS)]
        await found.paths.sign(HASH, strangers, verified=known)
        signed, _ = await found.paths.sign(HASH, [by("z"), by("b_1")], verified=known)
        assert len(signed) == MOST_BUT_OURS + 1
        assert {by("a-1"), by("z")} < set(signed) and by("b_1") not in signed
        signed, ours = await found.paths.sign(HASH, [by("a-1", 2)], verified=known)
        assert by("a-1", 2) not in signed and ours == {"a-1"}


async def test_what_comes_while_an_upload_is_verified_is_judged_too(tmp_path: Path) -> None:
    """Nobody holds the index meanwhile: others write."""
    asked: list[set[Signature]] = []
    async with index(tmp_path) as found:

        async def known(signatures: Iterable[Signature]) -> list[Signature]:
            asked.append(set(signatures))
            if len(asked) == 1:
                await found.paths.sign(HASH, [by("y"), *strangers])
            return [signature for signature in signatures if signature.key_name in ("y", "z")]

        strangers = [by("m", n) for n in range(MAX_SIGNATURES - 2)]
        signed, _ = await found.paths.sign(HASH, [by("z")], verified=known)
        assert asked == [{by("z")}, {by("y"), *strangers}], "each once"
        assert {by("a-1"), by("y"), by("z")} < set(signed)
        assert len(signed) == MAX_SIGNATURES


async def test_who_never_comes_to_an_end_of_verifying_is_told_so(tmp_path: Path) -> None:
    async with index(tmp_path) as found:
        count = 0

        async def known(signatures: Iterable[Signature]) -> list[Signature]:
            nonlocal count
            count += 1
            await found.paths.sign(HASH, [by("m", count)])
            return []

        with pytest.raises(Unavailable, match="try again"):
            await found.paths.sign(HASH, [by("z")], verified=known)
        admitted = await found.path(HASH)
        assert admitted and by("z") not in admitted[0].signatures


async def test_every_worker_hears_of_a_withdrawal(tmp_path: Path) -> None:
    async with index(tmp_path) as found:
        epoch = Epoch.of(f"sqlite:///{tmp_path}/index.sqlite")
        before = epoch.read()
        await found.paths.withdraw(HASH)
        assert epoch.read() != before


async def test_rows_come_in_pages_and_each_once(tmp_path: Path) -> None:
    async with index(tmp_path) as found:
        items = [entry(f"item-{n}", b"%d" % n) for n in range(5)]
        for item in items:
            nar = NarRecord.of(item.info, "https://u")
            info = item.info.with_signatures((by("b_1"),))
            await found.admit(PathRecord(info, nar.file, "signature b_1"), nar)
        wanted = sorted(item.hash for item in items)

        async def signed(after: str) -> list[str]:
            return await found.paths.signed_by("b_1", after=after, limit=2)

        async def lacking(after: str) -> list[str]:
            return await found.paths.lacking(["a-1"], after=after, limit=2)

        for ask in (signed, lacking):
            seen: list[str] = []
            while page := await ask(seen[-1] if seen else ""):
                assert len(page) <= 2
                seen += page
            assert seen == wanted


async def test_what_is_signed_anew_waits_for_its_sigstore_signature(tmp_path: Path) -> None:
    async with index(tmp_path, attest=True) as found:
        admitted = await found.path(HASH)
        assert admitted
        stored = replace(admitted[1], stored=True, file_size=1)
        await found.publish(admitted[1], stored)
        assert (await found.attestations.queue())[0] == 1
        await found.withdraw(stored.file)
        assert (await found.attestations.queue())[0] == 0
        await found.admit(PathRecord(ITEM.info, stored.file, "content"), stored)
        await found.attestations.drop(await found.attestations.oldest(9))
        assert (await found.attestations.queue())[0] == 0
        await found.paths.sign(HASH, [by("b_1")])
        assert (await found.attestations.queue())[0] == 1


async def test_what_was_verified_for_one_text_is_added_to_no_other(tmp_path: Path) -> None:
    """The path was withdrawn, or came back with another text, while its signatures were fetched."""
    other = ITEM.but(nar_size=ITEM.info.nar_size + 8)
    async with index(tmp_path) as found:
        admitted = await found.path(HASH)
        assert admitted
        path, nar = admitted
        await found.paths.sign(HASH, [by("b_1")], only=still_says(path))
        await found.paths.withdraw(HASH)
        with pytest.raises(NotFound):
            await found.paths.sign(HASH, [by("bx1")], only=still_says(path))
        await found.revocations.add(Revocation("key", "a-1", "", 0.0, "stolen"))
        wanted = replace(NarRecord.of(other.info, "https://u"), file=f"other-{nar.file}")
        await found.admit(PathRecord(other.info, wanted.file, "content"), wanted)
        with pytest.raises(NotFound):
            await found.paths.sign(HASH, [by("bx1")], only=still_says(path))
        now = await found.path(HASH)
        assert now and (now[0].info.nar_size, now[0].signatures) == (other.info.nar_size, ())


async def test_many_are_signed_only_as_they_were_judged(tmp_path: Path) -> None:
    """One of them was withdrawn meanwhile, another came back as another; then a key is revoked."""
    items = [entry(f"item-{n}", b"%d" % n) for n in range(3)]
    async with index(tmp_path) as found:
        for item in items:
            nar = NarRecord.of(item.info, "https://u")
            await found.admit(PathRecord(item.info, nar.file, "signature b_1"), nar)
        read = [admitted for item in (ITEM, *items) if (admitted := await found.path(item.hash))]
        signings = [
            Signing(path, Brought(path.info.store_path.hash_part, (by("z"),), frozenset("z"), ()))
            for path, _ in read
        ]
        await found.paths.withdraw(items[1].hash)
        judged = await found.revocations.now()
        assert await found.paths.sign_all(signings, judged, lambda: False) is None
        other = replace(read[3][0], info=items[2].but(nar_size=8).info)
        signings[3] = replace(signings[3], record=other)
        done = await found.paths.sign_all(signings, judged, lambda: True)
        assert done and [signed is None for signed in done] == [False, False, True, True]
        assert done[0] == ((by("a-1"), by("z")), frozenset({"a-1", "z"}))
        for item, is_signed in zip((ITEM, *items), (True, True, False, False), strict=True):
            admitted = await found.path(item.hash)
            assert admitted and (by("z") in admitted[0].signatures) == is_signed
        await found.revocations.add(Revocation("key", "a-1", "", 0.0, "stolen"))
        again = [replace(s, brought=replace(s.brought, signatures=(by("y"),))) for s in signings]
        assert await found.paths.sign_all(again, judged, lambda: True) is None
        admitted = await found.path(items[0].hash)
        assert admitted and by("y") not in admitted[0].signatures

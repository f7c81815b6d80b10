"""What the index admits, decided within its transaction: names, pins, revoked keys, what is stored."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from narseal.errors import Refused
from narseal.nix.hashes import Hash
from narseal.nix.keys import SecretKey
from narseal.nix.realisation import parse_at
from narseal.storage import (
    Index,
    NarRecord,
    PathRecord,
    RealisationRecord,
    Revocation,
)
from tests.tools.cache import Entry, entry, key, store_path
from tests.tools.index import index

KEY = key("up-1")
STRANGER = key("stranger-1")
EVIDENCE = f"signature {KEY.public.name}"
ITEM = entry("app", b"1", compression="zstd").signed(KEY)
OTHER = entry("other", b"2", compression="zstd").signed(KEY)


def path(item: Entry, evidence: str = EVIDENCE) -> PathRecord:
    return PathRecord(item.info, nar(item).file, evidence)


def nar(item: Entry, upstream: str = "https://u") -> NarRecord:
    return NarRecord.of(item.info, upstream)


def stored(item: Entry) -> NarRecord:
    """As an upload brings it: under its own hash."""
    assert item.info.file_hash and item.info.file_size
    file = item.info.url.removeprefix("nar/")
    found = NarRecord.from_file(
        item.info, file, file_hash=item.info.file_hash, file_size=item.info.file_size
    )
    return replace(found, stored=True)


def trace(out: Entry, *signers: SecretKey, evidence: str = EVIDENCE) -> RealisationRecord:
    name = f"build-trace-v2/{store_path('app.drv')}/out.doi"
    body = f'{{"outPath":"{out.info.store_path}","signatures":[]}}'.encode()
    entry_ = parse_at(name, body)
    signatures = tuple(s.sign(entry_.fingerprint()) for s in signers)
    return RealisationRecord(name, entry_.with_signatures(signatures), evidence)


async def revoke(found: Index, name: str) -> None:
    await found.revocations.add(Revocation("key", name, "", 0.0, "stolen"))


@pytest.mark.parametrize(
    ("signed", "evidence"),
    [
        ((KEY,), EVIDENCE),
        ((KEY,), "upload 1"),  # its evidence is another, and it carries the signature
        ((STRANGER,), EVIDENCE),  # it carries none, and rests on it
        ((), f"upload 1 {EVIDENCE}"),
    ],
)
async def test_nothing_by_a_revoked_key_is_pinned(
    tmp_path: Path, signed: tuple[SecretKey, ...], evidence: str
) -> None:
    """It was weighed and signed before the revocation, and comes to the transaction after it."""
    item = entry("app", b"1", compression="zstd").signed(*signed)
    async with index(tmp_path) as found:
        await revoke(found, KEY.public.name)
        for work in (
            found.admit_stored(path(item, evidence), stored(item)),
            found.admit(path(item, evidence), nar(item)),
            found.admit_realisation(trace(item, *signed, evidence=evidence)),
        ):
            with pytest.raises(Refused, match="revoked meanwhile"):
                await work
        assert await found.path(item.hash) is None
        assert await found.realisation(trace(item).key) is None
        # another's revocation is nobody else's
        good = entry("app", b"1", compression="zstd").signed(STRANGER)
        assert await found.admit(path(good, "signature stranger-1"), nar(good))


async def test_one_that_is_revoked_takes_none_of_its_group_along(tmp_path: Path) -> None:
    good = entry("good", b"3").signed(STRANGER)
    async with index(tmp_path) as found:
        await revoke(found, KEY.public.name)
        outcomes = await asyncio.gather(
            found.admit(path(ITEM), nar(ITEM)),
            found.admit(path(good, "signature stranger-1"), nar(good)),
            found.admit(path(OTHER), nar(OTHER)),
            return_exceptions=True,
        )
        assert [isinstance(outcome, Refused) for outcome in outcomes] == [True, False, True]
        assert not isinstance(outcomes[1], BaseException)
        assert outcomes[1][0].info.store_path == good.info.store_path


async def test_a_path_in_force_keeps_what_it_was_admitted_with(tmp_path: Path) -> None:
    async with index(tmp_path) as found:
        await found.admit(path(ITEM), nar(ITEM))
        again = entry("app", b"1", compression="zstd").signed(STRANGER)
        admitted, _ = await found.admit(path(again, "content"), nar(ITEM))
        assert (admitted.evidence, admitted.signatures) == (EVIDENCE, ITEM.info.signatures)
        await found.paths.withdraw(ITEM.hash)
        admitted, _ = await found.admit(path(again, "content"), nar(ITEM))
        assert (admitted.evidence, admitted.withdrawn) == ("content", False)
        kept = await found.path(ITEM.hash)
        assert kept and kept[0] == admitted


async def test_a_realisation_in_force_keeps_what_it_was_admitted_with(tmp_path: Path) -> None:
    first, other = trace(ITEM, KEY), trace(ITEM, STRANGER, evidence="signature stranger-1")
    async with index(tmp_path) as found:
        assert await found.admit_realisation(first) == first
        assert await found.admit_realisation(other) == first
        with pytest.raises(Refused, match="the pin holds"):
            await found.admit_realisation(trace(OTHER, KEY))
        await found.realisations.withdraw(first.key)
        assert await found.admit_realisation(other) == other
        assert await found.realisation(first.key) == other


@pytest.mark.parametrize("field", ["nar_hash", "nar_size", "compression"])
async def test_a_file_name_means_one_nar(tmp_path: Path, field: str) -> None:
    """Who claims a taken name for another NAR gets another name, and takes nobody's away."""
    claimed = nar(ITEM)
    others = {"nar_hash": Hash.sha256(b"x"), "nar_size": claimed.nar_size + 8, "compression": "xz"}
    item = ITEM.but(**{field: others[field]})
    other = replace(nar(item), file=claimed.file)
    async with index(tmp_path) as found:
        assert (await found.bind(claimed)).file == claimed.file
        assert (await found.bind(claimed)).file == claimed.file
        bound = await found.bind(other)
        assert bound == replace(other, file=bound.file) != other
        admitted = await found.admit(path(item), other)
        assert (admitted[0].nar_file, admitted[1]) == (bound.file, bound)
        assert await found.nar(claimed.file) == claimed


async def test_a_nar_whose_names_are_both_taken_gets_a_name_of_its_own(tmp_path: Path) -> None:
    claimed = nar(ITEM)
    by_nar_hash = replace(claimed, file=f"{ITEM.info.nar_hash.nix32}.nar.zst")
    async with index(tmp_path) as found:
        for taken in (claimed, by_nar_hash):
            await found.bind(replace(taken, nar_hash=Hash.sha256(b"x")))
        bound = await found.bind(claimed)
        assert bound.file not in (claimed.file, by_nar_hash.file)
        assert bound == replace(claimed, file=bound.file)


async def test_a_name_leads_to_where_its_bytes_are(tmp_path: Path) -> None:
    """A file hash was wrong over right content: the file has its true name, and goes by the other."""
    claimed = nar(ITEM)
    true = replace(claimed, file=f"{Hash.sha256(b'x').nix32}.nar.zst", file_hash=Hash.sha256(b"x"),
                   stored=True)  # fmt: skip
    async with index(tmp_path) as found:
        await found.admit(path(ITEM), claimed)
        await found.bind(replace(true, stored=False))
        await found.publish(claimed, true)
        admitted = await found.path(ITEM.hash)
        assert admitted and (admitted[0].nar_file, admitted[1]) == (true.file, true)
        assert (await found.bind(claimed)) == true
        # what is there under a name that leads elsewhere is not what was uploaded by that name
        assert (
            await found.admit_stored(path(OTHER), replace(stored(ITEM), file=claimed.file)) is None
        )


@pytest.mark.parametrize("field", ["nar_hash", "nar_size", "compression", "file_hash"])
async def test_an_upload_is_stored_only_as_the_very_file(tmp_path: Path, field: str) -> None:
    here = stored(ITEM)
    others = {"nar_hash": Hash.sha256(b"x"), "nar_size": here.nar_size + 8, "compression": "xz",
              "file_hash": Hash.sha256(b"x")}  # fmt: skip
    async with index(tmp_path) as found:
        assert await found.admit_stored(path(ITEM), here)
        assert await found.stored_bytes() == here.file_size
        assert await found.admit_stored(path(ITEM), here)
        assert await found.stored_bytes() == here.file_size
        other = replace(here, **{field: others[field]})  # type: ignore[arg-type]
        assert await found.admit_stored(path(OTHER), other) is None
        assert await found.path(OTHER.hash) is None


async def test_an_upload_under_a_name_that_is_only_claimed_is_not_stored(tmp_path: Path) -> None:
    async with index(tmp_path) as found:
        await found.bind(nar(ITEM))  # an upstream says that it has it
        assert await found.admit_stored(path(ITEM), stored(ITEM)) is None
        assert await found.stored_bytes() == 0


async def test_what_is_withdrawn_with_its_file_is_not_in_force(tmp_path: Path) -> None:
    async with index(tmp_path, attest=True) as found:
        await found.admit_stored(path(ITEM), stored(ITEM))
        await found.admit_stored(path(OTHER), stored(OTHER))
        assert (await found.attestations.queue())[0] == 2
        assert await found.withdraw(stored(ITEM).file) == [ITEM.hash]
        gone, kept = await found.path(ITEM.hash), await found.path(OTHER.hash)
        assert gone and gone[0].withdrawn
        assert kept and not kept[0].withdrawn
        assert (await found.attestations.queue())[0] == 1
        await found.unpublish(stored(OTHER).file)
        assert (await found.attestations.queue())[0] == 0
        assert await found.stored_bytes() == stored(ITEM).file_size
        record = await found.nar(stored(OTHER).file)
        assert record and not record.stored
        await found.unpublish(stored(OTHER).file)  # it counts once
        assert await found.stored_bytes() == stored(ITEM).file_size

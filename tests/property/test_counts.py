"""What the index counts beside its rows is what they come to, whatever was done to them, in whatever order.

Every step is one that narseal takes; after each the rows are read, and counted here.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from narseal.errors import NarsealError
from narseal.nix.realisation import parse_at
from narseal.storage import (
    Index,
    NarRecord,
    PathRecord,
    RealisationRecord,
    Revocation,
    SignedBatch,
    migrate,
)
from narseal.storage.attestations import Signed
from narseal.storage.claims import Brought, Signing
from narseal.storage.inventory import Inventory
from narseal.storage.records import file_name
from tests.tools.cache import entry, key, store_path

OURS = ("ours-1", "ours-2")
NAMES = ("upstream-1", *OURS)
#: Two of them are one NAR.
ITEMS = [entry(f"item{n}", b"%d" % (n // 2), compression="zstd") for n in range(4)]
DIGEST, OTHER = bytes(32), b"1" * 32

Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ("admit", "upload", "publish", "correct", "lose", "withdraw file", "withdraw",
             "revoke", "sign", "sign all", "realise", "withdraw realisation", "sign realisation",
             "attest", "forget", "drop", "enqueue", "bring", "again")
        ),
        st.integers(0, len(ITEMS) - 1),
        st.integers(0, len(NAMES) - 1),
    ),
    min_size=1,
    max_size=30,
)  # fmt: skip


def stored(number: int) -> NarRecord:
    """The NAR of an item under its own hash."""
    info = ITEMS[number].info
    assert info.file_hash and info.file_size
    file = file_name(info.file_hash, info.compression)
    found = NarRecord.from_file(info, file, file_hash=info.file_hash, file_size=info.file_size)
    return replace(found, stored=True)


def claimed(number: int) -> NarRecord:
    """The same as an upstream has it, under a name that is wrong."""
    return replace(
        NarRecord.of(ITEMS[number].info, "https://u"), file=f"{'0' * 50}{number // 2:02}.nar.zst"
    )


def path(number: int, nar: NarRecord, signer: str) -> PathRecord:
    info = ITEMS[number].info
    signature = key(signer).sign(info.fingerprint())
    ours = frozenset({signer}) & frozenset(OURS)
    evidence = f"signature {signer}" if number % 2 else "upload 1"
    return PathRecord(info.with_signatures((signature,)), nar.file, evidence, ours=ours)


def realisation(number: int, signer: str) -> RealisationRecord:
    name = f"build-trace-v2/{store_path(f'{number}.drv')}/out.doi"
    bare = f'{{"outPath":"{ITEMS[number].info.store_path}","signatures":[]}}'.encode()
    parsed = parse_at(name, bare)
    signed = parsed.with_signatures((key(signer).sign(parsed.fingerprint()),))
    ours = frozenset({signer}) & frozenset(OURS)
    return RealisationRecord(name, signed, f"signature {signer}", ours=ours)


async def take(index: Index, step: Step) -> None:
    """What narseal refuses changes nothing, or not all."""
    what, number, which = step
    name = NAMES[which]
    nar = stored(number)
    hash_part = ITEMS[number].hash
    revoked = await index.revocations.now()

    async def sign_all() -> None:
        there = [await index.path(item.hash) for item in ITEMS]
        signings = [
            Signing(row, Brought(row.info.store_path.hash_part,
                                 (*row.signatures, key(name).sign(row.message)),
                                 row.ours | {name}, ()))
            for row, _ in filter(None, there)
        ]  # fmt: skip
        await index.paths.sign_all(signings, revoked, lambda: True)

    async def attest() -> None:
        batch = [read.admitted for read in await index.attestations.oldest(2)]
        signed = SignedBatch(DIGEST, "x", batch, frozenset(), {})
        await index.attestations.commit(signed, revoked, lambda: True)

    async def drop() -> None:
        if waiting := await index.attestations.oldest(1):
            await index.attestations.drop(waiting)

    async def bring() -> None:
        who = Signed("somebody", OTHER, revoked)
        subjects = frozenset({ITEMS[number].info.nar_hash.digest})
        await index.attestations.put(OTHER, "x", who, subjects, most=9, is_there=lambda: True)

    trace = realisation(number, name)
    steps: dict[str, Callable[[], Awaitable[object]]] = {
        "admit": lambda: index.admit(path(number, claimed(number), name), claimed(number)),
        "upload": lambda: index.admit_stored(path(number, nar, name), nar),
        "publish": lambda: _published(index, nar, nar),
        "correct": lambda: _published(index, claimed(number), nar),
        "lose": lambda: index.unpublish(nar.file),
        "withdraw file": lambda: index.withdraw(nar.file),
        "withdraw": lambda: index.paths.withdraw(hash_part),
        "revoke": lambda: index.revocations.add(Revocation("key", name, "", 0.0, "x")),
        "sign": lambda: index.paths.sign(
            hash_part, [key(name).sign(b"x")], ours=[name] if which else []
        ),
        "sign all": sign_all,
        "realise": lambda: index.admit_realisation(trace),
        "withdraw realisation": lambda: index.realisations.withdraw(trace.key),
        "sign realisation": lambda: index.realisations.sign(
            trace.key, [key(OURS[0]).sign(b"x")], ours=OURS[:1]
        ),
        "attest": attest,
        "forget": lambda: index.attestations.forget(DIGEST),
        "drop": drop,
        "enqueue": index.attestations.enqueue_all,
        "bring": bring,
    }
    with suppress(NarsealError):
        await steps[what]()


async def _published(index: Index, was: NarRecord, nar: NarRecord) -> None:
    bound = await index.bind(replace(was, stored=False))
    true = await index.bind(replace(nar, stored=False))
    await index.publish(bound, replace(nar, file=true.file))


async def check(index: Index, file: Path) -> None:
    """Every count that is kept is what the rows come to."""
    with closing(sqlite3.connect(file)) as connection:
        connection.row_factory = sqlite3.Row
        nars = {row["file"]: row for row in connection.execute("SELECT * FROM nar")}
        paths = {row["hash_part"]: row for row in connection.execute("SELECT * FROM path")}
        traces = connection.execute("SELECT * FROM realisation").fetchall()
        waits = connection.execute("SELECT * FROM waiting").fetchall()
    assert await index.stored_bytes() == sum(n["file_size"] for n in nars.values() if n["stored"])
    in_force = [row for row in paths.values() if not row["withdrawn"]]
    assert await index.count() == len(in_force)
    for names in chain(*(combinations(NAMES, size) for size in range(1, 4))):
        for claims, rows in ((index.paths, in_force), (index.realisations, traces)):
            lack = [
                row for row in rows
                if not row["withdrawn"] and not set(names) <= set(row["ours"].split())
            ]  # fmt: skip
            assert await claims.count_lacking(names) == len(lack), names
    waiting = [
        row for row in waits
        if not paths[row["hash_part"]]["withdrawn"]
        and nars[paths[row["hash_part"]]["nar_file"]]["stored"]
    ]  # fmt: skip
    since = min((row["since"] for row in waiting), default=None)
    assert await index.attestations.queue() == (len(waiting), since)
    assert len(await index.attestations.oldest(99)) == len(waiting)
    with Inventory.opened(f"sqlite:///{file}", "/nix/store") as inventory:
        assert inventory.miscounts() == []


@pytest.fixture(scope="module")
def empty() -> Path:
    """An index that knows nothing, to be copied."""
    folder = Path(tempfile.mkdtemp())
    migrate(f"sqlite:///{folder}/index.sqlite")
    return folder / "index.sqlite"


@asynccontextmanager
async def opened(file: Path) -> AsyncIterator[Index]:
    index = Index(f"sqlite:///{file}", "/nix/store", attest=True)
    running = asyncio.create_task(index.run())
    try:
        yield index
    finally:
        await index.close()
        await running


@example([("upload", 0, 0), ("withdraw", 0, 0), ("upload", 0, 0)])
@example([("upload", 0, 0), ("withdraw file", 0, 0), ("enqueue", 0, 0)])
@example([("upload", 0, 0), ("lose", 0, 0), ("upload", 0, 1)])
@example([("upload", 0, 0), ("attest", 0, 0), ("sign", 0, 1), ("withdraw", 0, 0)])
@given(STEPS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_counted_is_what_the_rows_come_to(empty: Path, steps: list[Step]) -> None:
    async def go(file: Path) -> None:
        left = iter(steps)
        going = True
        while going:
            going = False
            async with opened(file) as index:
                for step in left:
                    if step[0] == "again":
                        going = True
                        break
                    await take(index, step)
                    await check(index, file)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(shutil.copy(empty, folder))
        asyncio.run(go(file))

"""What the index does within a transaction: pin, bind, publish, withdraw."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from sqlalchemy import Column, ColumnElement, bindparam, delete, select, update
from sqlalchemy.dialects.sqlite import insert as insert_or
from sqlalchemy.ext.asyncio import AsyncConnection

from narseal.errors import Refused
from narseal.nix.hashes import Hash
from narseal.storage import schema
from narseal.storage.attestations import enqueue, forget_path, leave
from narseal.storage.records import (
    PATHS,
    Admitted,
    NarRecord,
    PathRecord,
    RealisationRecord,
    admitted_of_all,
    conflict,
    file_name,
    is_void,
    nar_of,
    nar_values,
    path_values,
    realisation_of,
    realisation_values,
)
from narseal.storage.revocations import revoked_keys


def among(column: Column[Any]) -> ColumnElement[bool]:
    """Rows of a group; the group is the parameter `among`."""
    return column.in_(bindparam("among", expanding=True))


# built once: what SQLAlchemy makes of a statement costs more than SQLite's answer
PATHS_BY_HASH = PATHS.where(among(schema.path.c.hash_part))
NARS_BY_FILE = select(schema.nar).where(among(schema.nar.c.file))
_NEW_NAR = insert_or(schema.nar).on_conflict_do_nothing()
_NEW_PATH = insert_or(schema.path).on_conflict_do_nothing()
_NEW_REALISATION = insert_or(schema.realisation).on_conflict_do_nothing()
_STORED = (
    update(schema.nar)
    .where(schema.nar.c.file == bindparam("named"), ~schema.nar.c.stored)
    .values({name: bindparam(name) for name in schema.nar.c.keys()})  # noqa: SIM118 (a collection, no dict)
)
_ADD_BYTES = update(schema.total).values(nar_bytes=schema.total.c.nar_bytes + bindparam("more"))


class Admissions:
    """Each method is given the connection of a transaction that its caller commits."""

    def __init__(self, store_dir: str, *, attest: bool) -> None:
        self._store_dir = store_dir
        self._attest = attest

    async def enqueue_path(self, connection: AsyncConnection, hash_part: str) -> None:
        """Let a path wait for its Sigstore signature, if it was not attested."""
        query = select(schema.path.c.nar_file).where(schema.path.c.hash_part == hash_part)
        await enqueue(connection, [(await connection.execute(query)).scalar_one()])

    async def admit_all(
        self, connection: AsyncConnection, group: list[Admitted]
    ) -> list[Admitted | Exception]:
        """Bind and pin a group: five statements where everything is new, as it mostly is.

        What is revoked by now is refused, whatever was known when it was weighed.
        """
        outcomes: list[Admitted | Exception] = []
        revoked = await revoked_keys(connection)
        await connection.execute(_NEW_NAR, [nar_values(nar) for _, nar in group])
        files = [nar.file for _, nar in group]
        rows = await connection.execute(NARS_BY_FILE, {"among": files})
        named = {row.file: nar_of(row) for row in rows}
        for path, nar in group:
            try:
                _check_not_revoked(path, revoked)
                bound = named[nar.file]
                if bound != nar:
                    bound = await self.bind(connection, nar)
                outcomes.append((replace(path, nar_file=bound.file), bound))
            except Refused as error:
                outcomes.append(error)
        admitted = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
        if admitted:
            await connection.execute(_NEW_PATH, [path_values(path) for path, _ in admitted])
        hash_parts = [path.info.store_path.hash_part for path, _ in admitted]
        there = (await connection.execute(PATHS_BY_HASH, {"among": hash_parts})).all()
        pinned = {
            pair[0].info.store_path.hash_part: pair
            for pair in await admitted_of_all(there, self._store_dir)
        }
        pins = [
            outcome
            if isinstance(outcome, Exception)
            else await self._pin(connection, outcome, pinned, revoked)
            for outcome in outcomes
        ]
        stored = {pin[1].file for pin in pins if not isinstance(pin, Exception) and pin[1].stored}
        if stored and self._attest:
            await enqueue(connection, sorted(stored))
        return pins

    async def admit_stored_all(
        self, connection: AsyncConnection, group: list[Admitted]
    ) -> list[Admitted | Exception | None]:
        """Pin what was published under its own hash; None where its name is another NAR's."""
        files = [nar.file for _, nar in group]
        rows = await connection.execute(NARS_BY_FILE, {"among": files})
        named = {row.file: nar_of(row) for row in rows}
        now = time.time()
        fresh = {
            nar.file: replace(nar, verified_at=now) for _, nar in group if nar.file not in named
        }
        if fresh:
            await connection.execute(_NEW_NAR, [nar_values(nar) for nar in fresh.values()])
            await _add_bytes(connection, sum(nar.file_size or 0 for nar in fresh.values()))
        named |= fresh
        taken = [(path, named[nar.file]) for path, nar in group if _is_same(named[nar.file], nar)]
        outcomes = iter(await self.admit_all(connection, taken) if taken else [])
        return [next(outcomes) if _is_same(named[nar.file], nar) else None for _, nar in group]

    async def _pin(
        self,
        connection: AsyncConnection,
        wanted: Admitted,
        pins: dict[str, Admitted],
        revoked: frozenset[str],
    ) -> Admitted | Exception:
        """What is pinned, if it agrees; a withdrawn path is put in force again as `wanted`."""
        info = wanted[0].info
        hash_part = info.store_path.hash_part
        pinned = pins[hash_part]
        if pinned[0].message != wanted[0].message and not _is_void(pinned[0], revoked):
            return conflict(pinned[0].info, info)
        if not pinned[0].withdrawn:
            return pinned
        if pinned[0].message != wanted[0].message:
            await forget_path(connection, hash_part)  # it is another one that was attested
        await connection.execute(
            update(schema.path)
            .where(schema.path.c.hash_part == hash_part)
            .values(**path_values(wanted[0]))
        )
        return wanted

    async def admit_realisation(
        self, connection: AsyncConnection, record: RealisationRecord
    ) -> RealisationRecord:
        """What is pinned at an address, if it agrees; a withdrawn one is put in force again."""
        revoked = await revoked_keys(connection)
        _check_not_revoked(record, revoked)
        if (await connection.execute(_NEW_REALISATION, realisation_values(record))).rowcount:
            return record
        named = schema.realisation.c.key == record.key
        query = select(schema.realisation).where(named)
        pinned = realisation_of((await connection.execute(query)).one())
        if pinned.message != record.message and not _is_void(pinned, revoked):
            raise Refused(
                "conflict", f"{record.key} is pinned to {pinned.entry.out_path}; the pin holds"
            )
        if not pinned.withdrawn:
            return pinned
        change = update(schema.realisation).where(named).values(**realisation_values(record))
        await connection.execute(change)
        return record

    async def bind(self, connection: AsyncConnection, nar: NarRecord) -> NarRecord:
        """The row of the file name: the present one if it means the same NAR, else a new one."""
        by_nar_hash = file_name(nar.nar_hash, nar.compression)
        # the last is nobody's to take: names that a narinfo claims are only claimed
        unclaimed = file_name(Hash("sha256", os.urandom(32)), nar.compression)
        for file in dict.fromkeys((nar.file, by_nar_hash, unclaimed)):
            candidate = replace(nar, file=file)
            if (await connection.execute(_NEW_NAR, nar_values(candidate))).rowcount:
                return candidate
            query = select(schema.nar).where(schema.nar.c.file == file)
            present = nar_of((await connection.execute(query)).one())
            if (present.nar_hash, present.nar_size, present.compression) != (
                nar.nar_hash,
                nar.nar_size,
                nar.compression,
            ):
                continue
            if present.published_as:
                query = select(schema.nar).where(schema.nar.c.file == present.published_as)
                present = nar_of((await connection.execute(query)).one())
            if not present.stored and (present.upstream, present.url) != (
                nar.upstream,
                nar.url,
            ):
                present = replace(present, upstream=nar.upstream, url=nar.url)
                await connection.execute(
                    update(schema.nar)
                    .where(schema.nar.c.file == present.file)
                    .values(upstream=nar.upstream, url=nar.url)
                )
            return present
        raise Refused("conflict", f"both names of {nar.url} already stand for other NARs")

    async def publish(
        self, connection: AsyncConnection, claimed: NarRecord, true: NarRecord
    ) -> None:
        """Record that bytes are in storage; see `Index.publish`."""
        now = time.time()
        change = nar_values(true) | {"named": true.file, "verified_at": now}
        if (await connection.execute(_STORED, change)).rowcount:
            await _add_bytes(connection, true.file_size or 0)
        else:
            await self.verified(connection, true.file, now)
        if true.file != claimed.file:
            claims = schema.nar.c.file == claimed.file
            await connection.execute(
                update(schema.nar).where(claims).values(published_as=true.file)
            )
            await connection.execute(
                update(schema.path)
                .where(schema.path.c.nar_file == claimed.file)
                .values(nar_file=true.file)
            )
        if self._attest:
            await enqueue(connection, [true.file])

    async def verified(self, connection: AsyncConnection, file: str, at: float) -> None:
        """Record when a stored file was last found to be right."""
        named = schema.nar.c.file == file
        await connection.execute(update(schema.nar).where(named).values(verified_at=at))

    async def unpublish(self, connection: AsyncConnection, file: str) -> None:
        """Record that a file is not in storage any more."""
        query = select(schema.nar).where(schema.nar.c.file == file, schema.nar.c.stored)
        row = (await connection.execute(query)).first()
        if row is not None:
            await _add_bytes(connection, -(row.file_size or 0))
            await connection.execute(
                update(schema.nar).where(schema.nar.c.file == file).values(stored=False)
            )
            await leave(connection, file)

    async def withdraw(self, connection: AsyncConnection, file: str) -> list[str]:
        """Stop serving what names a file; returns hash parts."""
        old = schema.refusal.c.until < time.time()
        await connection.execute(delete(schema.refusal).where(old))
        named = schema.path.c.nar_file == file
        rows = await connection.execute(select(schema.path.c.hash_part).where(named))
        hash_parts = [str(row.hash_part) for row in rows]
        await connection.execute(update(schema.path).where(named).values(withdrawn=True))
        await leave(connection, file)
        return hash_parts


def _is_void(pinned: PathRecord | RealisationRecord, revoked: frozenset[str]) -> bool:
    """Whether a pin rests on revoked keys alone: then it holds nobody to it."""
    return pinned.withdrawn and is_void(pinned.evidence, revoked)


def _check_not_revoked(record: PathRecord | RealisationRecord, revoked: frozenset[str]) -> None:
    """Refused if a key was revoked since the record was weighed and signed: it is done again."""
    names = {signature.key_name for signature in record.signatures}
    if revoked and (is_void(record.evidence, revoked) or names & revoked):
        raise Refused("revoked", f"a key was revoked meanwhile: {', '.join(sorted(revoked))[:200]}")


def _is_same(bound: NarRecord, nar: NarRecord) -> bool:
    """Whether a name already stands for a stored NAR."""
    return (
        bound.stored
        and bound.published_as is None
        and (bound.nar_hash, bound.nar_size, bound.compression, bound.file_hash)
        == (nar.nar_hash, nar.nar_size, nar.compression, nar.file_hash)
    )


async def _add_bytes(connection: AsyncConnection, size: int) -> None:
    await connection.execute(_ADD_BYTES, {"more": size})

"""The index's part of Sigstore: the durable queue, and which bundle covers what."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Insert,
    Row,
    Select,
    bindparam,
    delete,
    exists,
    func,
    or_,
    select,
)
from sqlalchemy.dialects.sqlite import insert as insert_or
from sqlalchemy.ext.asyncio import AsyncConnection

from narseal.errors import UploadTooLarge
from narseal.storage import schema
from narseal.storage.engine import Engines
from narseal.storage.records import PATHS, Admitted, Attestation, admitted_of_all

_Ask = Callable[[Select[Any]], Awaitable[list[Row[Any]]]]


def _enqueue(*conditions: Any) -> Insert:
    """Paths with a stored NAR, not attested as that file: they wait from now on."""
    done = exists().where(
        schema.attested.c.hash_part == schema.path.c.hash_part,
        schema.attested.c.file == schema.path.c.nar_file,
    )
    rows = (
        select(schema.path.c.hash_part, bindparam("now", type_=schema.waiting.c.since.type))
        .join(schema.nar, schema.path.c.nar_file == schema.nar.c.file)
        .where(schema.nar.c.stored, ~schema.path.c.withdrawn, ~done, *conditions)
    )
    fresh = insert_or(schema.waiting).from_select(["hash_part", "since"], rows)
    return fresh.on_conflict_do_nothing()


_OF_FILES = schema.path.c.nar_file.in_(bindparam("among", expanding=True))
_ENQUEUE = _enqueue(_OF_FILES)
# SQLite wants a WHERE before ON CONFLICT in an INSERT from a SELECT, and there is one
_ENQUEUE_ALL = _enqueue()
_LEAVE = delete(schema.waiting).where(
    schema.waiting.c.hash_part.in_(select(schema.path.c.hash_part).where(_OF_FILES))
)


def bundle_name(digest: bytes) -> str:
    """Where a bundle is in storage, by its own SHA-256."""
    return f"attestations/{digest.hex()}.sigstore.json"


async def enqueue(connection: AsyncConnection, files: Sequence[str]) -> None:
    """Within a transaction that publishes or admits: the paths of these files wait."""
    await connection.execute(_ENQUEUE, {"among": files, "now": time.time()})


async def leave(connection: AsyncConnection, file: str) -> None:
    """Within a transaction that takes a file away: its paths do not wait any more."""
    await connection.execute(_LEAVE, {"among": [file]})


def _of(subjects: frozenset[bytes]) -> ColumnElement[bool]:
    """Paths that one of these digests is of: their NAR's, or their stored file's."""
    files = select(schema.nar.c.file).where(schema.nar.c.file_hash.in_(subjects))
    return or_(schema.path.c.nar_hash.in_(subjects), schema.path.c.nar_file.in_(files))


#: So many times as many attestations of a digest by all signers as by one.
_SIGNERS = 16


@dataclass(frozen=True, slots=True)
class Signed:
    """What was verified of a bundle: who signed, and the SHA-256 of what."""

    signer: str
    statement: bytes


class Attestations:
    """What waits, and what was signed."""

    def __init__(
        self, engines: Engines, ask: _Ask, survey: _Ask, store_dir: str, *, attest: bool = False
    ) -> None:
        """`survey` is for questions that may take long."""
        self._attest = attest
        self._engines = engines
        self._ask = ask
        self._survey = survey
        self._store_dir = store_dir

    async def enqueue_all(self) -> None:
        """Let everything wait that is stored and was never attested."""
        await self._engines.write(lambda c: c.execute(_ENQUEUE_ALL, {"now": time.time()}))

    async def queue(self) -> tuple[int, float | None]:
        """How many paths wait, and since what Unix time the first does."""
        query: Any = select(
            func.count().label("waiting"), func.min(schema.waiting.c.since).label("since")
        ).select_from(schema.waiting)
        row = (await self._survey(query))[0]
        return int(row.waiting), row.since

    async def oldest(self, limit: int) -> list[Admitted]:
        """The paths that wait longest, with their stored NARs."""
        query = (
            PATHS.join(schema.waiting, schema.waiting.c.hash_part == schema.path.c.hash_part)
            .where(schema.nar.c.stored, ~schema.path.c.withdrawn)
            .order_by(schema.waiting.c.since, schema.path.c.hash_part)
            .limit(limit)
        )
        return await admitted_of_all(await self._ask(query), self._store_dir)

    async def commit(
        self,
        digest: bytes,
        predicate_type: str,
        paths: Sequence[Admitted],
        subjects: frozenset[bytes],
        file_bundles: Mapping[str, bytes],
    ) -> None:
        """Record a bundle over a batch: all of it in one transaction.

        What does not wait any more (it was withdrawn meanwhile) is not recorded as attested.
        """

        async def work(connection: AsyncConnection) -> None:
            hash_parts = [path.info.store_path.hash_part for path, _ in paths]
            gone = delete(schema.waiting).where(schema.waiting.c.hash_part.in_(hash_parts))
            rows = await connection.execute(gone.returning(schema.waiting.c.hash_part))
            waited = {row.hash_part for row in rows}
            values = {"digest": digest, "predicate_type": predicate_type, "made_at": time.time()}
            await connection.execute(insert_or(schema.attestation), [values])
            covered = [{"digest": subject, "attestation": digest} for subject in subjects]
            await connection.execute(insert_or(schema.subject), covered)
            done = [
                {"hash_part": hash_part, "file": nar.file, "attestation": digest}
                for hash_part, (_, nar) in zip(hash_parts, paths, strict=True)
                if hash_part in waited
            ]
            if done:
                await connection.execute(insert_or(schema.attested).on_conflict_do_nothing(), done)
            if file_bundles:
                bundles = [{"file": file, "bundle": data} for file, data in file_bundles.items()]
                await connection.execute(
                    insert_or(schema.file_signature).on_conflict_do_nothing(), bundles
                )

        await self._engines.write(work)

    async def forget(self, digest: bytes) -> None:
        """Give a bundle out no more, and let the paths that it attested wait again."""
        named = schema.attestation.c.digest == digest

        async def work(connection: AsyncConnection) -> None:
            for table in (schema.subject, schema.attested):
                await connection.execute(delete(table).where(table.c.attestation == digest))
            await connection.execute(delete(schema.attestation).where(named))

        await self._engines.write(work)

    async def singles(self, *, after: str, limit: int) -> list[tuple[str, bytes]]:
        """Signatures of single files, with the files' names, in order, beyond one."""
        table = schema.file_signature
        query: Select[Any] = (
            select(table).where(table.c.file > after).order_by(table.c.file).limit(limit)
        )
        return [(row.file, bytes(row.bundle)) for row in await self._ask(query)]

    async def forget_single(self, file: str) -> None:
        """Give a file's own signature out no more, and attest its paths anew."""
        table = schema.file_signature

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(delete(table).where(table.c.file == file))
            await connection.execute(delete(schema.attested).where(schema.attested.c.file == file))

        await self._engines.write(work)

    async def has(self, digest: bytes) -> bool:
        """Whether a bundle is recorded."""
        named = schema.attestation.c.digest == digest
        query: Select[Any] = select(schema.attestation.c.digest).where(named)
        return bool(await self._ask(query))

    async def digests(self) -> list[bytes]:
        """Of every bundle over a statement."""
        return [bytes(row.digest) for row in await self._ask(select(schema.attestation.c.digest))]

    async def covering(self, *digests: bytes) -> list[Attestation]:
        """The bundles whose statements cover any of some file or NAR digests, oldest first."""
        query = (
            select(schema.attestation, schema.subject.c.digest.label("subject"))
            .join(schema.subject, schema.subject.c.attestation == schema.attestation.c.digest)
            .where(schema.subject.c.digest.in_(digests))
            .order_by(schema.attestation.c.made_at, schema.attestation.c.digest)
        )
        return [
            Attestation(
                bytes(row.digest), bytes(row.subject), row.predicate_type, row.signer, row.made_at
            )
            for row in await self._ask(query)
        ]

    async def put(
        self,
        digest: bytes,
        predicate_type: str,
        signed: Signed,
        subjects: frozenset[bytes],
        *,
        most: int,
    ) -> bool:
        """Record a bundle that somebody brought; whether it is new.

        It is not if the same signer's bundle over the same statement is there: however many ways
        there are to write it down. UploadTooLarge if one of its subjects has `most` attestations
        by that signer, or sixteen times as many by all, already. The paths that
        it covers wait for narseal's own, where they were not attested: they may pass now.
        """

        async def work(connection: AsyncConnection) -> bool:
            table = schema.attestation.c
            known = (table.statement == signed.statement) & (table.signer == signed.signer)
            same = select(table.digest).where(or_(table.digest == digest, known)).limit(1)
            if (await connection.execute(same)).first():
                return False
            count = (
                select(func.count())
                .select_from(schema.subject.join(schema.attestation))
                .where(schema.subject.c.digest.in_(subjects))
                .group_by(schema.subject.c.digest)
                .order_by(func.count().desc())
                .limit(1)
            )
            for bound, counted in (
                (most, count.where(table.signer == signed.signer)),
                (most * _SIGNERS, count),
            ):
                if ((await connection.execute(counted)).scalar() or 0) >= bound:
                    raise UploadTooLarge(
                        f"there are {bound} attestations of that digest; attestations.per_digest"
                        " bounds those of each signer"
                    )
            values = {
                "digest": digest,
                "predicate_type": predicate_type,
                "made_at": time.time(),
                "signer": signed.signer,
                "statement": signed.statement,
            }
            await connection.execute(insert_or(schema.attestation), [values])
            covered = [{"digest": subject, "attestation": digest} for subject in subjects]
            await connection.execute(insert_or(schema.subject), covered)
            if self._attest:
                rows = await connection.execute(select(schema.path.c.nar_file).where(_of(subjects)))
                await enqueue(connection, sorted({row.nar_file for row in rows}))
            return True

        return await self._engines.write(work)  # type: ignore[no-any-return]

    async def paths_of(self, subjects: frozenset[bytes]) -> list[str]:
        """The hash parts of the admitted paths that these file and NAR digests are of."""
        query: Select[Any] = select(schema.path.c.hash_part).where(
            _of(subjects), ~schema.path.c.withdrawn
        )
        return [row.hash_part for row in await self._ask(query)]

    async def drop(self, hash_parts: Sequence[str]) -> None:
        """Let paths wait no more that policy does not let through."""
        gone = delete(schema.waiting).where(schema.waiting.c.hash_part.in_(hash_parts))
        await self._engines.write(lambda c: c.execute(gone))

    async def of_file(self, file: str) -> tuple[bytes | None, bytes | None]:
        """The single signature of a file, and the digest of the newest batch that covers it."""
        query = select(schema.file_signature.c.bundle).where(schema.file_signature.c.file == file)
        rows = await self._ask(query)
        single = bytes(rows[0].bundle) if rows else None
        newest = (
            select(schema.attested.c.attestation)
            .join(schema.attestation, schema.attested.c.attestation == schema.attestation.c.digest)
            .where(schema.attested.c.file == file)
            .order_by(schema.attestation.c.made_at.desc())
            .limit(1)
        )
        rows = await self._ask(newest)
        return single, bytes(rows[0].attestation) if rows else None

    async def is_waiting(self, name: str) -> bool:
        """Whether a path still waits whose file's name is, or begins with, `name`."""
        query: Select[Any] = (
            select(schema.waiting.c.hash_part)
            .join(schema.path, schema.path.c.hash_part == schema.waiting.c.hash_part)
            .where(schema.path.c.nar_file >= name, schema.path.c.nar_file < f"{name}\x7f")
            .limit(1)
        )
        return bool(await self._ask(query))

    async def paths(self, *, after: str, limit: int) -> list[str]:
        """Hash parts of admitted paths, in order, beyond one."""
        query = (
            select(schema.path.c.hash_part)
            .where(schema.path.c.hash_part > after, ~schema.path.c.withdrawn)
            .order_by(schema.path.c.hash_part)
            .limit(limit)
        )
        return [row.hash_part for row in await self._ask(query)]

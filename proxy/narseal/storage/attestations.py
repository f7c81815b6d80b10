"""The index's part of Sigstore: the durable queue, and which bundle covers what."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
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

from narseal.errors import UploadTooLarge
from narseal.storage import schema
from narseal.storage.engine import Engines
from narseal.storage.prepared import Prepared
from narseal.storage.records import PATHS, Admitted, Attestation, admitted_of, admitted_of_all
from narseal.storage.revocations import Revoked, revoked_by_now

#: So many seconds later a path waits since, each time it is enqueued again: its row is another one then, and
#: its place the same. It is some times what a column of Unix times holds apart.
_ANEW = 1e-6


def _unattested(*columns: Any) -> Select[Any]:
    """Paths with a stored NAR, not attested as that file."""
    done = exists().where(
        schema.attested.c.hash_part == schema.path.c.hash_part,
        schema.attested.c.file == schema.path.c.nar_file,
    )
    return (
        select(schema.path.c.hash_part, *columns)
        .join(schema.nar, schema.path.c.nar_file == schema.nar.c.file)
        .where(schema.nar.c.stored, ~schema.path.c.withdrawn, ~done)
    )


def _enqueue(*conditions: Any, again: bool = False) -> Insert:
    """Those wait from now on.

    `again`: those that wait already, too. They keep their place, and are another row to whoever
    read them before, whatever the clocks of both say.
    """
    now = bindparam("now", type_=schema.waiting.c.since.type)
    # with a WHERE, without which SQLite takes ON CONFLICT for part of the SELECT
    rows = _unattested(now).where(*conditions)
    fresh = insert_or(schema.waiting).from_select(["hash_part", "since"], rows)
    if not again:
        return fresh.on_conflict_do_nothing()
    return fresh.on_conflict_do_update(
        ["hash_part"], set_={"since": schema.waiting.c.since + _ANEW}
    )


_OF_FILE = schema.path.c.nar_file == bindparam("file")
_ENQUEUE = Prepared(_enqueue(_OF_FILE, again=True))
_PAGE = 1000


def bundle_name(digest: bytes) -> str:
    """Where a bundle is in storage, by its own SHA-256."""
    return f"attestations/{digest.hex()}.sigstore.json"


def enqueue(connection: Connection, files: Sequence[str]) -> None:
    """Within a transaction after which rules may let paths of these files through: they wait.

    They wait anew: who read them before, and judges them by what held then, does not take them off
    the queue.
    """
    now = time.time()
    for file in files:
        _ENQUEUE.run(connection, file=file, now=now)


def forget_path(connection: Connection, hash_part: str) -> None:
    """Within a transaction that pins other content to a path: none of our bundles is of that."""
    named = schema.attested.c.hash_part == hash_part
    connection.execute(delete(schema.attested).where(named))


def _of(subjects: frozenset[bytes]) -> ColumnElement[bool]:
    """Paths that one of these digests is of: their NAR's, or their stored file's."""
    files = select(schema.nar.c.file).where(schema.nar.c.file_hash.in_(subjects))
    return or_(schema.path.c.nar_hash.in_(subjects), schema.path.c.nar_file.in_(files))


#: What can be signed now. Nothing waits that was withdrawn, or whose file is gone: see the schema.
_QUEUE = Prepared(
    select(
        schema.total.c.waiting,
        select(func.min(schema.waiting.c.since)).scalar_subquery().label("since"),
    )
)
_ALL_WAITING = (
    PATHS.add_columns(schema.waiting.c.since)
    .join(schema.waiting, schema.waiting.c.hash_part == schema.path.c.hash_part)
    .order_by(schema.waiting.c.since, schema.path.c.hash_part)
)
_THOSE_WAITING = _ALL_WAITING.where(schema.path.c.hash_part.in_(bindparam("among", expanding=True)))
#: Our bundles of paths in force, as the file that the path has now.
_OURS = (
    select(
        schema.attestation,
        schema.path.c.nar_hash.label("subject"),
    )
    .join(schema.attested, schema.attested.c.attestation == schema.attestation.c.digest)
    .join(
        schema.path,
        (schema.path.c.hash_part == schema.attested.c.hash_part)
        & (schema.path.c.nar_file == schema.attested.c.file),
    )
    .where(~schema.path.c.withdrawn)
)
_GROUP = 500
_DROP = delete(schema.waiting).where(
    schema.waiting.c.hash_part == bindparam("who"), schema.waiting.c.since == bindparam("read")
)


#: So many times as many attestations of a digest by all signers as by one.
_SIGNERS = 16


@dataclass(frozen=True, slots=True)
class Signed:
    """What was verified of a bundle: who signed, and the SHA-256 of what."""

    signer: str
    statement: bytes
    #: What was revoked when it was verified.
    judged: Revoked


@dataclass(frozen=True, slots=True)
class Waiting:
    """A path that waits, as it was read."""

    admitted: Admitted
    #: Another one by now, if it was enqueued again.
    since: float


@dataclass(frozen=True, slots=True)
class SignedBatch:
    """A bundle of ours over a batch, to be recorded."""

    #: SHA-256 of the bundle.
    digest: bytes
    predicate_type: str
    #: What it says of which paths, as they were judged.
    paths: Sequence[Admitted]
    #: SHA-256 of the heads of audit logs that it anchors.
    heads: frozenset[bytes]
    #: Bundles over single files, by the files' names.
    singles: Mapping[str, bytes]


class Attestations:
    """What waits, and what was signed."""

    def __init__(self, engines: Engines, store_dir: str, *, attest: bool = False) -> None:
        self._attest = attest
        self._engines = engines
        self._ask = engines.ask
        self._store_dir = store_dir

    async def enqueue_all(self) -> None:
        """Let everything wait that is stored and was never attested; page by page.

        It is looked for before anything is written: mostly there is nothing, and nobody is kept
        from writing while that is found out.
        """
        waits = exists().where(schema.waiting.c.hash_part == schema.path.c.hash_part)
        async for page in self._engines.pages(schema.path.c.hash_part, _PAGE):
            if await self._engines.survey(_unattested().where(page, ~waits).limit(1)):
                fresh = _enqueue(page)
                now = {"now": time.time()}
                await self._engines.write_long(
                    partial(Connection.execute, statement=fresh, parameters=now)
                )

    async def queue(self) -> tuple[int, float | None]:
        """How many paths wait, and since what Unix time the first does."""
        row = self._engines.first(_QUEUE)
        return int(row.waiting), row.since

    async def oldest(self, limit: int) -> list[Waiting]:
        """The paths that wait longest, with their stored NARs."""
        rows = await self._ask(_ALL_WAITING.limit(limit))
        found = await admitted_of_all(rows, self._store_dir)
        return [Waiting(path, row.since) for path, row in zip(found, rows, strict=True)]

    async def still_waiting(self, paths: Sequence[Admitted]) -> list[Admitted]:
        """Those of some paths that wait, and of which the index says what it said."""
        hash_parts = [path.info.store_path.hash_part for path, _ in paths]
        rows = await self._ask(_THOSE_WAITING.params(among=hash_parts))
        return await asyncio.to_thread(self._unchanged, paths, rows)

    def _unchanged(self, paths: Sequence[Admitted], rows: Sequence[Row[Any]]) -> list[Admitted]:
        found = [admitted_of(row, self._store_dir) for row in rows]
        now = {path.info.store_path.hash_part: (path, nar) for path, nar in found}
        return [old for old in paths if _says(now.get(old[0].info.store_path.hash_part), old)]

    async def commit(
        self, batch: SignedBatch, judged: Revoked, is_current: Callable[[], bool]
    ) -> list[Admitted] | None:
        """Record what a bundle covers, in one transaction; returns the paths.

        Those of the batch that are admitted as they were when they were judged: what was
        withdrawn or changed meanwhile is not covered. None, and nothing is recorded, if anything
        else is revoked than was when it was judged, or the rules are not current any more.
        """

        def work(connection: Connection) -> list[Admitted] | None:
            if revoked_by_now(connection).all != judged.all or not is_current():
                return None
            hash_parts = [path.info.store_path.hash_part for path, _ in batch.paths]
            rows = connection.execute(_THOSE_WAITING, {"among": hash_parts})
            covered = self._unchanged(batch.paths, rows.all())
            if covered:
                _record(connection, batch, covered)
            return covered

        return await self._engines.write_long(work)

    async def forget(self, digest: bytes) -> None:
        """Give a bundle out no more, and let the paths that it attested wait again."""
        named = schema.attestation.c.digest == digest

        def work(connection: Connection) -> None:
            for table in (schema.subject, schema.attested):
                connection.execute(delete(table).where(table.c.attestation == digest))
            connection.execute(delete(schema.attestation).where(named))

        await self._engines.write_long(work)

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

        def work(connection: Connection) -> None:
            connection.execute(delete(table).where(table.c.file == file))
            connection.execute(delete(schema.attested).where(schema.attested.c.file == file))

        await self._engines.write_long(work)

    async def discard(self, digest: bytes, remove: Callable[[], None]) -> None:
        """Have a bundle's file taken away in a thread, unless it is recorded.

        Within a transaction, as `put` looks for the file: no bundle is recorded without one.
        """
        query = select(schema.attestation.c.digest).where(schema.attestation.c.digest == digest)

        def work(connection: Connection) -> None:
            if connection.execute(query).first() is None:
                remove()

        await self._engines.write_long(work)

    async def digests(self) -> list[bytes]:
        """Of every bundle over a statement."""
        return [bytes(row.digest) for row in await self._ask(select(schema.attestation.c.digest))]

    async def ours(self, hash_parts: Sequence[str]) -> list[Attestation]:
        """The bundles of narseal's own over some paths, as far as these are in force, oldest first."""
        found: set[Attestation] = set()
        for start in range(0, len(hash_parts), _GROUP):
            named = schema.path.c.hash_part.in_(hash_parts[start : start + _GROUP])
            found.update(await self._ours(named))
        return sorted(found, key=lambda a: (a.made_at, a.digest))

    async def ours_of(self, digests: frozenset[bytes]) -> list[Attestation]:
        """The same over all paths that some file or NAR digests are of, however many those are."""
        return await self._ours(_of(digests))

    async def ours_of_file(self, file: str) -> list[Attestation]:
        """The same over all paths whose narinfo names a file."""
        return await self._ours(schema.path.c.nar_file == file)

    async def _ours(self, condition: ColumnElement[bool]) -> list[Attestation]:
        ordered = _OURS.where(condition).order_by(
            schema.attestation.c.made_at, schema.attestation.c.digest
        )
        return [_attestation(row) for row in await self._ask(ordered.distinct())]

    async def is_withdrawn(self, file: str) -> bool:
        """Whether there are paths whose narinfo names a file, and all were withdrawn."""
        query: Select[Any] = select(func.min(schema.path.c.withdrawn).label("withdrawn"))
        rows = await self._ask(query.where(schema.path.c.nar_file == file))
        return bool(rows[0].withdrawn)  # without a path it is NULL

    async def covering(self, *digests: bytes) -> list[Attestation]:
        """The bundles that somebody brought of any of some file or NAR digests, oldest first.

        Of an audit log's head, those of ours that anchor it. What ours say of paths: see `ours`.
        """
        query = (
            select(schema.attestation, schema.subject.c.digest.label("subject"))
            .join(schema.subject, schema.subject.c.attestation == schema.attestation.c.digest)
            .where(schema.subject.c.digest.in_(digests))
            .order_by(schema.attestation.c.made_at, schema.attestation.c.digest)
        )
        return [_attestation(row) for row in await self._ask(query)]

    async def put(
        self,
        digest: bytes,
        predicate_type: str,
        signed: Signed,
        subjects: frozenset[bytes],
        *,
        most: int,
        is_there: Callable[[], bool],
    ) -> bool | None:
        """Record a bundle that somebody brought; whether it is new.

        None, and nothing is recorded, if anything else is revoked than when it was verified, or its
        file `is_there` no more: who brought it, too, and failed, took it away. See `discard`.

        It is not if the same signer's bundle over the same statement is there: however many ways
        there are to write it down. UploadTooLarge if one of its subjects has `most` attestations
        by that signer, or sixteen times as many by all, already. The paths that
        it covers wait for narseal's own, where they were not attested: they may pass now.
        """

        def work(connection: Connection) -> bool | None:
            if revoked_by_now(connection).all != signed.judged.all or not is_there():
                return None
            table = schema.attestation.c
            known = (table.statement == signed.statement) & (table.signer == signed.signer)
            same = select(table.digest).where(or_(table.digest == digest, known)).limit(1)
            if connection.execute(same).first():
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
                if (connection.execute(counted).scalar() or 0) >= bound:
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
            connection.execute(insert_or(schema.attestation), [values])
            covered = [{"digest": subject, "attestation": digest} for subject in subjects]
            connection.execute(insert_or(schema.subject), covered)
            if self._attest:
                rows = connection.execute(select(schema.path.c.nar_file).where(_of(subjects)))
                enqueue(connection, sorted({row.nar_file for row in rows}))
            return True

        return await self._engines.write_long(work)

    async def paths_of(self, subjects: frozenset[bytes]) -> list[str]:
        """The hash parts of the admitted paths that these file and NAR digests are of."""
        query: Select[Any] = select(schema.path.c.hash_part)
        rows = await self._ask(query.where(_of(subjects), ~schema.path.c.withdrawn))
        return [row.hash_part for row in rows]

    async def sharing(self, digests: frozenset[bytes], *, most: int) -> list[Admitted]:
        """Up to so many paths that these file and NAR digests are of; withdrawn ones last."""
        ordered = PATHS.where(_of(digests)).order_by(
            schema.path.c.withdrawn, schema.path.c.hash_part
        )
        return await admitted_of_all(await self._ask(ordered.limit(most)), self._store_dir)

    async def drop(self, kept_back: Sequence[Waiting]) -> None:
        """Let paths wait no more that policy does not let through, unless they came anew since."""
        gone = [
            {"who": path.admitted[0].info.store_path.hash_part, "read": path.since}
            for path in kept_back
        ]
        await self._engines.write(lambda c: c.execute(_DROP, gone))

    async def single(self, file: str) -> bytes | None:
        """The signature of a single file, as far as a path of it is in force."""
        in_force = exists().where(schema.path.c.nar_file == file, ~schema.path.c.withdrawn)
        named = schema.file_signature.c.file == file
        query = select(schema.file_signature.c.bundle).where(named, in_force)
        rows = await self._ask(query)
        return bytes(rows[0].bundle) if rows else None

    async def is_waiting(self, name: str) -> bool:
        """Whether a path in force still waits whose file's name is, or begins with, `name`."""
        begins = (schema.path.c.nar_file >= name, schema.path.c.nar_file < f"{name}\x7f")
        query: Select[Any] = (
            select(schema.waiting.c.hash_part)
            .join(schema.path, schema.path.c.hash_part == schema.waiting.c.hash_part)
            .where(*begins)
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


def _record(connection: Connection, batch: SignedBatch, covered: Sequence[Admitted]) -> None:
    """Within a transaction: a bundle, what it covers, and that this waits no more."""
    hash_parts = [path.info.store_path.hash_part for path, _ in covered]
    gone = delete(schema.waiting).where(schema.waiting.c.hash_part.in_(hash_parts))
    connection.execute(gone)
    values = {
        "digest": batch.digest,
        "predicate_type": batch.predicate_type,
        "made_at": time.time(),
    }
    connection.execute(insert_or(schema.attestation), [values])
    if batch.heads:
        heads = [{"digest": head, "attestation": batch.digest} for head in sorted(batch.heads)]
        connection.execute(insert_or(schema.subject), heads)
    done = [
        {"hash_part": hash_part, "file": nar.file, "attestation": batch.digest}
        for hash_part, (_, nar) in zip(hash_parts, covered, strict=True)
    ]
    connection.execute(insert_or(schema.attested).on_conflict_do_nothing(), done)
    singles = [
        {"file": file, "bundle": batch.singles[file]}
        for file in sorted({nar.file for _, nar in covered} & batch.singles.keys())
    ]
    if singles:
        connection.execute(insert_or(schema.file_signature).on_conflict_do_nothing(), singles)


def _attestation(row: Row[Any]) -> Attestation:
    return Attestation(
        bytes(row.digest), bytes(row.subject), row.predicate_type, row.signer, row.made_at
    )


def _says(now: Admitted | None, judged: Admitted) -> bool:
    """Whether the index still says of a path what a statement of ours does, and policy looked at."""
    if now is None:
        return False
    (path, nar), (old_path, old_nar) = now, judged
    return (path.message, nar.file, nar.file_hash) == (
        old_path.message,
        old_nar.file,
        old_nar.file_hash,
    ) and set(old_path.signatures) <= set(path.signatures)

"""What the index does within a transaction: pin, bind, publish, withdraw."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace

from sqlalchemy import Connection, bindparam, delete, select, update
from sqlalchemy.dialects.sqlite import insert as insert_or

from narseal.errors import Refused
from narseal.nix.hashes import Hash
from narseal.storage import schema
from narseal.storage.attestations import enqueue, forget_path
from narseal.storage.prepared import Prepared
from narseal.storage.records import (
    PATHS,
    Admitted,
    NarRecord,
    PathRecord,
    RealisationRecord,
    admitted_of,
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

# what each admission and publication says to the index
PATH_BY_HASH = Prepared(PATHS.where(schema.path.c.hash_part == bindparam("hash_part")))
NAR_BY_FILE = Prepared(select(schema.nar).where(schema.nar.c.file == bindparam("file")))
_FILE_OF = Prepared(
    select(schema.path.c.nar_file).where(schema.path.c.hash_part == bindparam("hash_part"))
)
# OR FAIL: of one row there is nothing to take back, so SQLite need not note for its triggers how (11 µs)
_NEW_NAR = Prepared(insert_or(schema.nar).prefix_with("OR FAIL").on_conflict_do_nothing())
_NEW_PATH = Prepared(insert_or(schema.path).prefix_with("OR FAIL").on_conflict_do_nothing())
_STORED = Prepared(
    update(schema.nar)
    .where(schema.nar.c.file == bindparam("named"), ~schema.nar.c.stored)
    .values({name: bindparam(name) for name in schema.nar.c.keys()})  # noqa: SIM118 (a collection, no dict)
)
_VERIFIED = Prepared(
    update(schema.nar)
    .where(schema.nar.c.file == bindparam("named"))
    .values(verified_at=bindparam("at"))
)
_NEW_REALISATION = insert_or(schema.realisation).on_conflict_do_nothing()


class Admissions:
    """Each method is given the connection of a transaction that its caller commits."""

    def __init__(self, store_dir: str, *, attest: bool) -> None:
        self._store_dir = store_dir
        self._attest = attest

    def enqueue_path(self, connection: Connection, hash_part: str) -> None:
        """Let a path wait for its Sigstore signature, if it was not attested."""
        enqueue(connection, [_FILE_OF.first(connection, hash_part=hash_part).nar_file])

    def admit(self, connection: Connection, path: PathRecord, nar: NarRecord) -> Admitted:
        """Bind and pin: two statements where both are new, as they mostly are.

        What is revoked by now is refused, whatever was known when it was weighed.
        """
        revoked = revoked_keys(connection)
        _check_not_revoked(path, revoked)
        return self._admit_as(connection, path, self.bind(connection, nar), revoked)

    def admit_stored(
        self, connection: Connection, path: PathRecord, nar: NarRecord
    ) -> Admitted | None:
        """Pin what was published under its own hash; None where its name is another NAR's."""
        named = NAR_BY_FILE.first(connection, file=nar.file)
        if named is None:
            bound = replace(nar, verified_at=time.time())
            _NEW_NAR.run(connection, **nar_values(bound))
        elif not _is_same(bound := nar_of(named), nar):
            return None
        revoked = revoked_keys(connection)
        _check_not_revoked(path, revoked)
        return self._admit_as(connection, path, bound, revoked)

    def _admit_as(
        self, connection: Connection, path: PathRecord, bound: NarRecord, revoked: frozenset[str]
    ) -> Admitted:
        """Pin a path with a NAR whose name is bound."""
        pin = path if path.nar_file == bound.file else replace(path, nar_file=bound.file), bound
        if not _NEW_PATH.run(connection, **path_values(pin[0])):
            pin = self._pin(connection, pin, revoked)
        if pin[1].stored and self._attest:
            enqueue(connection, [pin[1].file])
        return pin

    def _pin(self, connection: Connection, wanted: Admitted, revoked: frozenset[str]) -> Admitted:
        """What is pinned, if it agrees; a withdrawn path is put in force again as `wanted`."""
        info = wanted[0].info
        hash_part = info.store_path.hash_part
        row = PATH_BY_HASH.first(connection, hash_part=hash_part)
        pinned = admitted_of(row, self._store_dir)
        if pinned[0].message != wanted[0].message and not _is_void(pinned[0], revoked):
            raise conflict(pinned[0].info, info)
        if not pinned[0].withdrawn:
            return pinned
        if pinned[0].message != wanted[0].message:
            forget_path(connection, hash_part)  # it is another one that was attested
        connection.execute(
            update(schema.path)
            .where(schema.path.c.hash_part == hash_part)
            .values(**path_values(wanted[0]))
        )
        return wanted

    def admit_realisation(
        self, connection: Connection, record: RealisationRecord
    ) -> RealisationRecord:
        """What is pinned at an address, if it agrees; a withdrawn one is put in force again."""
        revoked = revoked_keys(connection)
        _check_not_revoked(record, revoked)
        if (connection.execute(_NEW_REALISATION, realisation_values(record))).rowcount:
            return record
        named = schema.realisation.c.key == record.key
        query = select(schema.realisation).where(named)
        pinned = realisation_of((connection.execute(query)).one())
        if pinned.message != record.message and not _is_void(pinned, revoked):
            raise Refused(
                "conflict", f"{record.key} is pinned to {pinned.entry.out_path}; the pin holds"
            )
        if not pinned.withdrawn:
            return pinned
        change = update(schema.realisation).where(named).values(**realisation_values(record))
        connection.execute(change)
        return record

    def bind(self, connection: Connection, nar: NarRecord) -> NarRecord:
        """The row of the file name: the present one if it means the same NAR, else a new one."""
        for candidate in _names(nar):
            file = candidate.file
            if _NEW_NAR.run(connection, **nar_values(candidate)):
                return candidate
            present = nar_of(NAR_BY_FILE.first(connection, file=file))
            if (present.nar_hash, present.nar_size, present.compression) != (
                nar.nar_hash,
                nar.nar_size,
                nar.compression,
            ):
                continue
            if present.published_as:
                present = nar_of(NAR_BY_FILE.first(connection, file=present.published_as))
            if not present.stored and (present.upstream, present.url) != (
                nar.upstream,
                nar.url,
            ):
                present = replace(present, upstream=nar.upstream, url=nar.url)
                connection.execute(
                    update(schema.nar)
                    .where(schema.nar.c.file == present.file)
                    .values(upstream=nar.upstream, url=nar.url)
                )
            return present
        raise Refused("conflict", f"both names of {nar.url} already stand for other NARs")

    def publish(self, connection: Connection, claimed: NarRecord, true: NarRecord) -> None:
        """Record that bytes are in storage; see `Index.publish`."""
        now = time.time()
        change = nar_values(true) | {"named": true.file, "verified_at": now}
        if not _STORED.run(connection, **change):
            self.verified(connection, true.file, now)
        if true.file != claimed.file:
            claims = schema.nar.c.file == claimed.file
            connection.execute(update(schema.nar).where(claims).values(published_as=true.file))
            connection.execute(
                update(schema.path)
                .where(schema.path.c.nar_file == claimed.file)
                .values(nar_file=true.file)
            )
        if self._attest:
            enqueue(connection, [true.file])

    def verified(self, connection: Connection, file: str, at: float) -> None:
        """Record when a stored file was last found to be right."""
        _VERIFIED.run(connection, named=file, at=at)

    def unpublish(self, connection: Connection, file: str) -> None:
        """Record that a file is not in storage any more."""
        change = update(schema.nar).where(schema.nar.c.file == file).values(stored=False)
        connection.execute(change)

    def withdraw(self, connection: Connection, file: str) -> list[str]:
        """Stop serving what names a file; returns hash parts."""
        old = schema.refusal.c.until < time.time()
        connection.execute(delete(schema.refusal).where(old))
        named = schema.path.c.nar_file == file
        rows = connection.execute(select(schema.path.c.hash_part).where(named))
        hash_parts = [str(row.hash_part) for row in rows]
        connection.execute(update(schema.path).where(named).values(withdrawn=True))
        return hash_parts


def _names(nar: NarRecord) -> Iterator[NarRecord]:
    """A NAR under each name that it may have: what its narinfo says, its hash, and one that is nobody's to take.

    Names that a narinfo claims are only claimed.
    """
    yield nar
    if (by_nar_hash := file_name(nar.nar_hash, nar.compression)) != nar.file:
        yield replace(nar, file=by_nar_hash)
    yield replace(nar, file=file_name(Hash("sha256", os.urandom(32)), nar.compression))


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
        bound.stored  # which another name of the same bytes never is
        and (bound.nar_hash, bound.nar_size, bound.compression, bound.file_hash)
        == (nar.nar_hash, nar.nar_size, nar.compression, nar.file_hash)
    )

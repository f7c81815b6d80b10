"""The life of what carries signatures, the same for paths and for realisations.

Both tables have the columns `signatures`, `ours`, `evidence` and `withdrawn`. Every change reads the
revocations in its own transaction: what is revoked while somebody still signs is not written.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Select,
    Table,
    bindparam,
    literal,
    or_,
    select,
    update,
)

from narseal.errors import BadUpload, NotFound, Unavailable
from narseal.nix.keyring import KeyRing
from narseal.nix.keys import Signature
from narseal.nix.narinfo import MAX_SIGNATURES, MOST_BUT_OURS
from narseal.runtime.threads import by_size
from narseal.storage import schema
from narseal.storage.engine import Engines
from narseal.storage.epoch import Epoch
from narseal.storage.prepared import Prepared
from narseal.storage.records import (
    TEXT,
    PathRecord,
    RealisationRecord,
    names_of,
    signatures_of,
    text_of,
)
from narseal.storage.revocations import Revoked, revoked_by_now, revoked_keys

#: Signatures, and the names of the operator's keys whose are among them.
Signed = tuple[tuple[Signature, ...], frozenset[str]]

#: Those of some signatures that are by a key that is known. It may take long.
Verified = Callable[[Collection[Signature]], Awaitable[Collection[Signature]]]

#: Done within the transaction that signed a row.
OnSigned = Callable[[Connection, str], None]

_SERVED = Prepared(
    select(schema.served.c.ours, schema.served.c.rows).where(
        schema.served.c.kind == bindparam("kind")
    )
)
_TRIES = MOST_BUT_OURS  # each that fails, somebody else added one


@dataclass(frozen=True, slots=True)
class Brought:
    """What is brought to a row."""

    key: str
    signatures: tuple[Signature, ...]
    #: Names of the operator's keys whose signatures among them were made or verified.
    ours: frozenset[str]
    #: What is taken away.
    drop: tuple[Signature, ...]


@dataclass(frozen=True, slots=True)
class Signing:
    """What was signed, as it was read, and what came of it."""

    record: PathRecord | RealisationRecord
    brought: Brought


def verified_by(ring: KeyRing, message: bytes) -> Verified:
    """By a key of a ring, over a message."""

    async def verified(signatures: Collection[Signature]) -> Collection[Signature]:
        return await by_size(len(message), ring.each_verified, message, signatures)

    return verified


class Claims:
    """The rows of one table, by their key."""

    def __init__(
        self,
        table: Table,
        key: Column[str],
        engines: Engines,
        epoch: Epoch,
        on_signed: OnSigned | None = None,
    ) -> None:
        self._table = table
        self._key = key
        self._engines = engines
        self._epoch = epoch
        self._on_signed = on_signed
        said = [table.c[name] for name in TEXT[table.name]]
        self._present = Prepared(
            select(table.c.signatures, table.c.ours, table.c.withdrawn, *said).where(
                key == bindparam("key")
            )
        )
        self._write = Prepared(
            update(table)
            .where(key == bindparam("named"))
            .values(signatures=bindparam("signatures"), ours=bindparam("ours"))
        )

    async def sign(
        self,
        key: str,
        signatures: Iterable[Signature],
        *,
        ours: Iterable[str] = (),
        drop: Iterable[Signature] = (),
        verified: Verified | None = None,
        only: ColumnElement[bool] | None = None,
    ) -> Signed:
        """Add signatures to a row's, take others and all by revoked keys away; what it has then.

        Whoever else adds some at the same time loses none. `ours` are the names of the operator's
        keys whose signatures were made or verified: they have room before others'. Of an upload,
        `verified` says which are by a key that is known here: they have room before strangers', and
        nothing in a name of the operator's is taken. It is asked outside the transaction, of all that
        the row has then; if somebody added others meanwhile, it is asked of those. NotFound if the row
        is gone, or is not `only` what the signatures were verified for; BadUpload if an upload brings
        more strangers' than are kept.
        """
        table = self._table.c
        named = self._key == key if only is None else (self._key == key) & only
        asked: set[Signature] = set()
        known: set[Signature] = set()
        uploaded = (asked, known) if verified else None
        brought = Brought(key, tuple(signatures), frozenset(ours), tuple(drop))

        def work(connection: Connection) -> Signed | frozenset[Signature]:
            """What the row has then; or, and nothing is written, what `verified` is to be asked of."""
            query = select(table.signatures, table.ours).where(named)
            row = connection.execute(query).first()
            if row is None:
                raise NotFound(f"{key} is not in the index any more, or is another one by now")
            return self._unite(connection, row, brought, revoked_keys(connection), uploaded)

        for _ in range(_TRIES):
            done: Signed | frozenset[Signature] = await self._engines.write(work)
            if not isinstance(done, frozenset):
                return done
            assert verified is not None  # else nothing is asked of it
            known.update(await verified(done))
            asked.update(done)
        raise Unavailable(f"{key}: somebody adds signatures all the time; try again")

    async def sign_all(
        self, signings: Sequence[Signing], judged: Revoked, is_current: Callable[[], bool]
    ) -> list[Signed | None] | None:
        """Add what was signed to many rows in one short transaction; what each has then.

        None for a row that is not in force any more, or is not what was signed. None for all, and
        nothing is written, if anything else is revoked than was when they were judged, or the rules
        that they were judged by are not current any more.
        """

        def work(connection: Connection) -> list[Signed | None] | None:
            if revoked_by_now(connection).all != judged.all or not is_current():
                return None
            return [self._sign_same(connection, signing, judged.keys) for signing in signings]

        return await self._engines.write(work)

    def _sign_same(
        self, connection: Connection, signing: Signing, revoked: frozenset[str]
    ) -> Signed | None:
        """Sign a row in force, if it is what was signed."""
        row = self._present.first(connection, key=signing.brought.key)
        if row is None or row.withdrawn or row[3:] != text_of(signing.record):
            return None
        done = self._unite(connection, row, signing.brought, revoked, None)
        assert not isinstance(done, frozenset)  # nothing is asked of others
        return done

    def _unite(
        self,
        connection: Connection,
        row: Any,
        brought: Brought,
        revoked: frozenset[str],
        uploaded: tuple[set[Signature], set[Signature]] | None,
    ) -> Signed | frozenset[Signature]:
        """Write what a row has with what was brought; see `sign`.

        Of an upload it is known of which signatures it was `asked`, and which of them are by a key
        that is known; if it was not asked of all, it is told of which not, and nothing is written.
        """
        there = set(signatures_of(row.signatures))
        names = (names_of(row.ours) | brought.ours) - revoked
        new = set(brought.signatures) - there
        if uploaded:
            new = {signature for signature in new if signature.key_name not in names}
        kept = sorted(s for s in (there | new) - set(brought.drop) if s.key_name not in revoked)
        own = [s for s in kept if s.key_name in names]
        others = [s for s in kept if s.key_name not in names]
        room = max(0, MAX_SIGNATURES - len(own))
        if uploaded:
            asked, known = uploaded
            if more := frozenset(others) - asked:
                return more
            good = known.intersection(others)
            others.sort(key=lambda s: (s not in good, s not in there, s))
            room = min(room, max(MOST_BUT_OURS, len(there.intersection(others))))
            if not good & new and not new.isdisjoint(others[room:]):
                raise BadUpload(f"{brought.key} has too many signatures: {len(others)} of others'")
        found = tuple(sorted([*own, *others[:room]]))
        self._write.run(
            connection,
            named=brought.key,
            signatures="\n".join(map(str, found)),
            ours="\n".join(sorted(names)),
        )
        if self._on_signed:
            self._on_signed(connection, brought.key)
        return found, names

    async def withdraw(self, key: str) -> None:
        """Stop serving one; its pin stays."""
        change = update(self._table).where(self._key == key).values(withdrawn=True)
        await self._engines.write(lambda c: c.execute(change))
        self._epoch.advance()

    async def signed_by(self, name: str, *, after: str, limit: int) -> list[str]:
        """Keys of rows, served or withdrawn, that carry a signature in a name."""
        text = literal("\n") + self._table.c.signatures
        return await self._keys([text.contains(f"\n{name}:", autoescape=True)], after, limit)

    async def lacking(self, names: Iterable[str], *, after: str, limit: int) -> list[str]:
        """Keys of served rows that lack a signature by one of some keys of the operator's."""
        return await self._keys(self.lack(names), after, limit)

    async def count_lacking(self, names: Iterable[str]) -> int:
        """How many there are of those."""
        wanted = frozenset(names)
        return sum(row.rows for row in self._served() if not wanted <= names_of(row.ours))

    async def count(self) -> int:
        """How many rows are served."""
        return sum(row.rows for row in self._served())

    def _served(self) -> list[Any]:
        """How many, by the keys of the operator's that signed them."""
        return self._engines.all(_SERVED, kind=self._table.name)

    def lack(self, names: Iterable[str]) -> list[ColumnElement[bool]]:
        """Of a row in force: it lacks a signature by one of some keys of the operator's."""
        text = literal("\n") + self._table.c.ours + literal("\n")
        lack = [~text.contains(f"\n{name}\n", autoescape=True) for name in names]
        return [or_(*lack), ~self._table.c.withdrawn]

    async def _keys(
        self, conditions: list[ColumnElement[bool]], after: str, limit: int
    ) -> list[str]:
        query: Select[Any] = select(self._key.label("key")).where(*conditions, self._key > after)
        return [
            row.key for row in await self._engines.survey(query.order_by(self._key).limit(limit))
        ]

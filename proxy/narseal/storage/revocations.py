"""What the operator revoked: nothing that rests on it is signed or served any more."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Row, Select, Table, literal, or_, select, update
from sqlalchemy.dialects.sqlite import insert as insert_or

from narseal.storage import schema
from narseal.storage.engine import Engines, connect
from narseal.storage.epoch import Epoch
from narseal.storage.prepared import Prepared
from narseal.storage.presence import index_file
from narseal.storage.records import is_void

Kind = Literal["key", "cosign", "identity"]

_ALL: Select[Any] = select(schema.revocation).order_by(
    schema.revocation.c.revoked_at, schema.revocation.c.kind, schema.revocation.c.name
)

_KEYS = Prepared(select(schema.revocation.c.name).where(schema.revocation.c.kind == "key"))


@dataclass(frozen=True, slots=True)
class Revocation:
    """One of them."""

    kind: Kind
    #: A substituter key's name, a cosign key's hint, or an identity.
    name: str
    #: Of an identity.
    issuer: str
    #: Unix time from which on an identity's signatures are void; 0 for keys.
    since: float
    reason: str


class Revoked:
    """All of them, as looked up."""

    def __init__(self, revocations: list[Revocation]) -> None:
        self.all = tuple(revocations)
        #: Names of Ed25519 keys, ours and others'.
        self.keys = frozenset(r.name for r in revocations if r.kind == "key")
        #: Hints of cosign keys.
        self.cosign_keys = frozenset(r.name for r in revocations if r.kind == "cosign")

    def bars(self, identity: str, issuer: str, signed_at: float) -> bool:
        """Whether a signature of an identity at a time is void."""
        return any(
            r.kind == "identity"
            and (r.name, r.issuer) == (identity, issuer)
            and signed_at >= r.since
            for r in self.all
        )


class Revocations:
    """Looked up again whenever the epoch changed, so that every worker knows within a moment."""

    def __init__(self, engines: Engines, epoch: Epoch) -> None:
        self._engines = engines
        self._epoch = epoch
        self._seen: int | None = None
        self._known = Revoked([])

    async def now(self) -> Revoked:
        """What is revoked. Unavailable if it cannot be found out."""
        self._epoch.presence.check()
        epoch = self._epoch.read()
        if epoch != self._seen:
            found = _revocations(await self._engines.ask(_ALL))
            if tuple(found) != self._known.all:  # the same value means: nothing changed
                self._known = Revoked(found)
            self._seen = epoch
        return self._known

    async def add(self, revocation: Revocation) -> list[str]:
        """Revoke, in one transaction with the withdrawal of what had no other evidence.

        What is withdrawn is admitted anew, if at all, on other evidence. Returns the hash parts of
        the paths among it, those of before included: it may be done again after it broke off.
        """

        def work(connection: Connection) -> list[str]:
            values = {
                "kind": revocation.kind,
                "name": revocation.name,
                "issuer": revocation.issuer,
                "since": revocation.since,
                "reason": revocation.reason,
                "revoked_at": time.time(),
            }
            row = insert_or(schema.revocation).values(**values)
            keys = ["kind", "name", "issuer"]
            connection.execute(
                row.on_conflict_do_update(
                    keys, set_={"since": revocation.since, "reason": revocation.reason}
                )
            )
            found: list[str] = []
            for table in (schema.path, schema.realisation):
                rests = _resting_on(connection, revocation, table)
                if table is schema.path:
                    paths = select(schema.path.c.hash_part).where(rests)
                    found = [str(row.hash_part) for row in connection.execute(paths)]
                change = update(table).where(rests, ~table.c.withdrawn).values(withdrawn=True)
                connection.execute(change)
            return found

        withdrawn: list[str] = await self._engines.write_long(work)
        self._epoch.advance()
        self._epoch.arrive()
        return withdrawn


def revoked_keys(connection: Connection) -> frozenset[str]:
    """The names of revoked substituter keys, as a transaction sees them."""
    return frozenset(row.name for row in _KEYS.all(connection))


def revoked_at(url: str) -> frozenset[str]:
    """The same of the index at `url`, of a process that has none open. Blocks."""
    with closing(connect(index_file(url))) as connection:
        return revoked_keys(connection)


def revoked_by_now(connection: Connection) -> Revoked:
    """All that is revoked, as a transaction sees it."""
    return Revoked(_revocations(list(connection.execute(_ALL))))


def _revocations(rows: list[Row[Any]]) -> list[Revocation]:
    return [Revocation(r.kind, r.name, r.issuer, r.since, r.reason) for r in rows]


def _resting_on(
    connection: Connection, revocation: Revocation, table: Table
) -> ColumnElement[bool]:
    """Rows that were admitted on the word of what is revoked, and of nobody else who is not."""
    evidence = table.c.evidence
    if revocation.kind == "key":
        rests = f"signature {revocation.name}"
        alone = or_(evidence == rests, evidence.endswith(f" {rests}", autoescape=True))
        among = (evidence + literal(" ")).contains(f" {revocation.name} ", autoescape=True)
        texts = connection.execute(select(evidence).where(among, ~alone).distinct())
        revoked = revoked_keys(connection)
        return or_(alone, evidence.in_([t for t in texts.scalars() if is_void(t, revoked)]))
    of = f" of {revocation.issuer}" if revocation.kind == "identity" else ""
    rests = f"bundle {revocation.name}{of}"
    return or_(evidence == rests, evidence.startswith(f"{rests} ", autoescape=True))

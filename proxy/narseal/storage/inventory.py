"""All rows of an index, for a command that compares them with the folder: in shares, in the order of their places.

A share is read from one end to the other, as it lies in the file; several can be read at the same time,
by several processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnClause,
    Connection,
    Integer,
    Select,
    bindparam,
    func,
    literal_column,
    select,
)

from narseal.errors import Unavailable
from narseal.storage import schema
from narseal.storage.counts import miscounts
from narseal.storage.engine import FAULTS, connect
from narseal.storage.prepared import Prepared
from narseal.storage.presence import index_file
from narseal.storage.records import PATHS, Admitted, admitted_of

_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Share:
    """Rows of `path` or of `nar`, by their places: from one to before another."""

    table: str
    first: int
    end: int


class Inventory:
    """Reads one index. Unavailable if it cannot be read. Blocks."""

    def __init__(self, connection: Connection, store_dir: str) -> None:
        self._connection = connection
        self.store_dir = store_dir

    @classmethod
    @contextmanager
    def opened(cls, url: str, store_dir: str) -> Iterator[Inventory]:
        """That of the index at `url`, which must be there."""
        try:
            with connect(index_file(url)) as connection:
                yield cls(connection, store_dir)
        except FAULTS as error:
            raise Unavailable(f"the index cannot be read: {error}") from error

    def shares(self, size: int) -> list[Share]:
        """Every row, NARs first, so many places to a share."""
        found = []
        for name in ("nar", "path"):
            place = _place(name)
            ends = select(func.min(place), func.max(place)).select_from(
                schema.metadata.tables[name]
            )
            first, last = self._connection.execute(ends).one()
            if first is not None:
                found += [Share(name, at, at + size) for at in range(first, last + 1, size)]
        return found

    def rows(self, share: Share) -> Iterator[Any]:
        """The stored files, or the served paths, of a share: rows of `nar`, or of PATHS."""
        for at in range(share.first, share.end, _PAGE):
            end = min(at + _PAGE, share.end)
            yield from _IN_SHARE[share.table].all(self._connection, at=at, end=end)

    def again(self, table: str, key: str) -> Any:
        """One of them, as it is by now; None if it is not stored, or served, any more."""
        return _BY_KEY[table].first(self._connection, key=key)

    def admitted(self, row: Any) -> Admitted:
        """A row of PATHS as a value."""
        return admitted_of(row, self.store_dir)

    def bundles(self) -> list[bytes]:
        """The digest of every bundle over a statement."""
        return list(self._connection.execute(select(schema.attestation.c.digest)).scalars())

    def miscounts(self) -> list[str]:
        """A sentence for each count that is kept, and is not what the rows come to."""
        return miscounts(self._connection)


def _place(table: str) -> ColumnClause[int]:
    """Where a row lies in its table's file."""
    return literal_column(f"{table}.rowid", Integer)


_ROWS: dict[str, Select[Any]] = {
    "nar": select(schema.nar).where(schema.nar.c.stored),
    "path": PATHS.where(~schema.path.c.withdrawn),
}
_IN_SHARE = {
    name: Prepared(rows.where(_place(name) >= bindparam("at"), _place(name) < bindparam("end")))
    for name, rows in _ROWS.items()
}
_BY_KEY = {
    name: Prepared(_ROWS[name].where(key == bindparam("key")))
    for name, key in (("nar", schema.nar.c.file), ("path", schema.path.c.hash_part))
}

"""What the index counts beside its rows, which triggers keep: compared with the rows, and counted anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import (
    Connection,
    Select,
    Table,
    delete,
    func,
    insert,
    literal,
    literal_column,
    select,
    update,
)

from narseal.storage import schema

_HELP = "stop narseal and run `narseal index rebuild`, which counts anew"

#: What each column of `total` is to be, and of what it is.
_TOTALS = (
    (
        schema.total.c.nar_bytes,
        select(func.coalesce(func.sum(schema.nar.c.file_size), 0)).where(schema.nar.c.stored),
        "bytes of NARs",
    ),
    (
        schema.total.c.waiting,
        select(func.count()).select_from(schema.waiting),
        "paths that wait",
    ),
)
#: Whose rows in force `served` counts.
_SERVED = (schema.path, schema.realisation)


def miscounts(connection: Connection) -> list[str]:
    """A sentence for each count that is kept, and is not what the rows come to."""
    found = []
    # each pair in one statement: it sees one state of the index
    for kept, counted, what in _TOTALS:
        said, true = connection.execute(select(kept, counted.scalar_subquery())).one()
        if said != true:
            found.append(f"the index counts {said} {what}, its rows {true}; {_HELP}")
    for table in _SERVED:
        found += _miscounts_of(connection, table)
    return found


def recount(connection: Connection) -> None:
    """Within a transaction: let every count be what the rows come to."""
    connection.execute(
        update(schema.total).values({kept: true.scalar_subquery() for kept, true, _ in _TOTALS})
    )
    connection.execute(delete(schema.served))
    for table in _SERVED:
        counted = _counted(table).add_columns(literal(table.name))
        connection.execute(insert(schema.served).from_select(["ours", "rows", "kind"], counted))


def _counted(table: Table) -> Select[Any]:
    """How many rows are in force, by whose signatures of ours they have."""
    ours = table.c.ours
    return select(ours, func.count().label("rows")).where(~table.c.withdrawn).group_by(ours)


def _miscounts_of(connection: Connection, table: Table) -> Iterator[str]:
    served = schema.served.c
    kept = select(served.ours, served.rows).where(served.kind == table.name, served.rows != 0)
    sides = (
        side.add_columns(literal_column(n)) for n, side in (("0", kept), ("1", _counted(table)))
    )
    rows = connection.execute(next(sides).union_all(next(sides))).all()
    said, true = ({ours: n for ours, n, side in rows if side == which} for which in (0, 1))
    for ours in sorted(said | true):
        if said.get(ours, 0) != true.get(ours, 0):
            yield (
                f"the index counts {said.get(ours, 0)} rows of {table.name} signed by"
                f" {ours.split() or 'nobody'}, there are {true.get(ours, 0)}; {_HELP}"
            )

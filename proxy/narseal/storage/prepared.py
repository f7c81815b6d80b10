"""Statements that every path needs: said in SQLAlchemy Core, made into SQL once, run by the driver.

What SQLAlchemy does for each run of a statement costs many times what SQLite does.
"""

from __future__ import annotations

import sqlite3
from collections import namedtuple
from typing import Any

from sqlalchemy import Boolean, Connection, Executable, Select
from sqlalchemy.dialects import sqlite

_DIALECT = sqlite.dialect(paramstyle="named")


class Prepared:
    """A statement whose parameters are given by name; a row has its columns as attributes.

    sqlite3.Error if it fails.
    """

    def __init__(self, statement: Executable) -> None:
        compiled = statement.compile(dialect=_DIALECT)  # type: ignore[attr-defined]
        self._text = str(compiled)
        #: What stands in the statement itself.
        self._fixed = {k: v for k, v in compiled.params.items() if v is not None}
        columns = list(statement.selected_columns) if isinstance(statement, Select) else []
        row: Any = namedtuple("row", [column.name for column in columns])  # type: ignore[misc] # noqa: PYI024
        self._row = row._make
        # of the types in use it alone is another one in SQLite
        self._booleans = [n for n, c in enumerate(columns) if isinstance(c.type, Boolean)]

    def first(self, connection: Connection, **values: Any) -> Any:
        """The first row, None if there is none."""
        row = self._run(connection, values).fetchone()
        return None if row is None else self._made(row)

    def all(self, connection: Connection, **values: Any) -> list[Any]:
        """All rows."""
        return [self._made(row) for row in self._run(connection, values).fetchall()]

    def run(self, connection: Connection, **values: Any) -> int:
        """Run what gives no rows; how many it changed."""
        return self._run(connection, values).rowcount

    def _run(self, connection: Connection, values: dict[str, Any]) -> sqlite3.Cursor:
        return driver_of(connection).execute(self._text, self._fixed | values)

    def _made(self, row: tuple[Any, ...]) -> Any:
        if not self._booleans:
            return self._row(row)
        values = list(row)
        for place in self._booleans:
            values[place] = bool(values[place])
        return self._row(values)


def driver_of(connection: Connection) -> sqlite3.Connection:
    """The connection below SQLAlchemy's."""
    found: Any = connection.connection.dbapi_connection
    assert isinstance(found, sqlite3.Connection)
    return found

"""The mark that an index and its folder share, as the index has it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from narseal.errors import ConfigError

_BUSY = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class IndexMark:
    """What the index says of its folder."""

    #: None: it was never joined to one.
    mark: str | None = None
    #: Whether the folder got it; a crash may have come between.
    is_settled: bool = False

    @property
    def joined(self) -> str | None:
        """The mark that the folder must bear."""
        return self.mark if self.is_settled else None


@contextmanager
def opened(file: Path) -> Iterator[sqlite3.Connection]:
    """An index that is there, of any schema, to be read and written; ConfigError if it cannot be."""
    try:
        address = f"file:{quote(str(file))}?mode=rw"
        with closing(sqlite3.connect(address, uri=True, timeout=_BUSY)) as connection:
            connection.execute("PRAGMA synchronous=FULL")
            yield connection
    except sqlite3.Error as error:
        raise ConfigError(f"storage.index {file}: {error}") from error


def has_table(connection: sqlite3.Connection, name: str) -> bool:
    """Whether the schema has it yet."""
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    return connection.execute(query, [name]).fetchone() is not None


def read_mark(file: Path) -> IndexMark:
    """The mark of an index that is there, of any schema."""
    with opened(file) as connection:
        if not has_table(connection, "folder"):
            return IndexMark()
        row = connection.execute("SELECT mark, settled FROM folder").fetchone()
        return IndexMark(row[0], bool(row[1])) if row else IndexMark()


def write_mark(file: Path, mark: IndexMark) -> None:
    """Set it, on disk when this returns."""
    with opened(file) as connection, connection:
        connection.execute(
            "INSERT INTO folder (id, mark, settled) VALUES (1, ?, ?) ON CONFLICT (id)"
            " DO UPDATE SET mark = excluded.mark, settled = excluded.settled",
            [mark.mark, mark.is_settled],
        )

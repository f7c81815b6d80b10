"""Opening the SQLite index: WAL, one writer that commits in groups, a pool of readers."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import alembic.command
import alembic.config
from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from narseal.errors import ConfigError, NarsealError, NoIndex, Unavailable
from narseal.runtime.batching import Batcher
from narseal.storage.presence import Presence, index_file

Write = Callable[[AsyncConnection], Awaitable[Any]]

_BUSY_MS = 10_000


def migrate(url: str) -> None:
    """Bring the index at `url` to the newest schema, making it where there is none.

    ConfigError if the place cannot be written or was made by a newer narseal.
    """
    file = index_file(url)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(f"sqlite:///{file}")
        _prepare(engine)
        with engine.begin() as connection:
            config = alembic.config.Config()
            config.set_main_option(
                "script_location", str(resources.files("narseal.storage") / "migrations")
            )
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")
        engine.dispose()
    except (OSError, SQLAlchemyError, alembic.util.CommandError) as error:
        raise ConfigError(f"storage.index {file}: {error}") from error


def migrate_present(url: str) -> None:
    """The same for what only looks at an index, or changes one: NoIndex if there is none."""
    _check_present(url)
    migrate(url)


def _check_present(url: str) -> None:
    file = index_file(url)
    try:
        if file.stat().st_size:
            return
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(f"storage.index {file}: {error.strerror}") from error
    raise NoIndex(
        f"storage.index {file}: there is no index. `narseal serve` makes one beside an empty folder,"
        " `narseal index rebuild` one of what the folder has (docs/recovery.md)"
    )


def backup(url: str, target: Path) -> None:
    """Copy the index into a new file, whole, also while narseal serves.

    NoIndex if there is none; ConfigError if it cannot be copied.
    """
    _check_present(url)
    try:
        with closing(sqlite3.connect(index_file(url))) as source:
            if target.exists():
                raise ConfigError(f"{target} is there already")
            with closing(sqlite3.connect(target)) as copy:
                source.backup(copy)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"{target}: {error}") from error


def _prepare(engine: Engine) -> None:
    """Full durability, and transactions that begin when we say so."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


class Engines:
    """A reading and a writing engine on one index file."""

    def __init__(self, url: str, presence: Presence) -> None:
        self._presence = presence
        # mode=rw: a connection never makes an empty database
        address = URL.create(
            "sqlite+aiosqlite",
            database=f"file:{quote(str(index_file(url)))}",
            query={"mode": "rw", "uri": "true"},
        )
        # single statements: no transaction to begin and to roll back around each
        self.reading: AsyncEngine = create_async_engine(
            address,
            pool_size=4,
            max_overflow=0,
            pool_timeout=60,
            isolation_level="AUTOCOMMIT",
            pool_reset_on_return=None,
        )
        self._writing = create_async_engine(address, pool_size=1, max_overflow=0)
        _prepare(self._writing.sync_engine)
        self._writes: Batcher[Write, Any] = Batcher(self._commit)

    async def write(self, work: Write) -> Any:
        """Run `work` in a transaction; returns its result once that is on disk.

        Works that come at the same time share a transaction. A work that raises an error of
        ours leaves what it wrote so far, which must do no harm, and its error reaches its caller
        only; Unavailable if the index cannot be written.
        """
        try:
            return await self._writes.ask(work)
        except (DBAPIError, OSError) as error:
            raise Unavailable(f"the index cannot be written: {error}") from error

    async def run(self) -> None:
        """The one writer; runs until closed, then lets go of every connection."""
        await self._writes.run()
        await self.reading.dispose()
        await self._writing.dispose()

    async def close(self) -> None:
        """Let `run` end once it wrote what was asked before."""
        await self._writes.close()

    async def _commit(self, works: list[Write]) -> list[Any]:
        self._presence.check()
        outcomes: list[Any] = []
        async with self._writing.begin() as connection:
            for work in works:
                try:
                    outcomes.append(await work(connection))
                except NarsealError as error:
                    outcomes.append(error)
        self._presence.check()  # else it was committed to a file that nobody will read
        return outcomes

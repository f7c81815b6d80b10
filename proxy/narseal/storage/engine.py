"""Opening the SQLite index: WAL, point reads and one writer on the loop, threads for what takes long."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Engine,
    NullPool,
    Row,
    Select,
    create_engine,
    event,
    select,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from narseal.errors import ConfigError, NarsealError, NoIndex, Unavailable, cannot_make
from narseal.runtime.batching import Batcher
from narseal.storage.prepared import Prepared, driver_of
from narseal.storage.presence import Presence, index_file

T = TypeVar("T")
_log = logging.getLogger(__name__)

#: What is done within a transaction, which its caller commits.
Write = Callable[[Connection], T]

_MIGRATIONS = resources.files("narseal.storage") / "migrations"
_BUSY_MS = 10_000
_BEGIN = "BEGIN IMMEDIATE"  # for writing: it waits, or fails, now and not in the middle
#: Works that share a transaction, and seconds after which the loop has a turn between two of them.
_GROUP = 64
_LONGEST = 0.005
#: Seconds between two copies of what was committed from the log into the database.
_CHECKPOINTS = 1.0
#: What a connection or a statement fails with, of the driver's and of SQLAlchemy's.
FAULTS = (sqlite3.Error, DBAPIError, OSError)


def migrate(url: str) -> None:
    """Bring the index at `url` to the newest schema, making it where there is none.

    ConfigError if the place cannot be written or was made by a newer narseal.
    """
    file = index_file(url)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        engine = _engine(file, "rwc")
        event.listen(engine, "begin", lambda c: c.exec_driver_sql(_BEGIN))
        with engine.begin() as connection:
            if _revision(connection) != newest_revision():
                _upgrade(connection)
    except (OSError, sqlite3.Error, SQLAlchemyError) as error:
        if "database is locked" in str(error):
            raise ConfigError(
                f"storage.index {file}: another process has been writing for {_BUSY_MS // 1000} s;"
                " nothing was changed, run it again"
            ) from error
        raise ConfigError(f"storage.index {file}: {error}") from error


def newest_revision() -> str:
    """The revision of the newest migration: the four digits with which its file's name begins."""
    files = (_MIGRATIONS / "versions").iterdir()
    return max(name[:4] for file in files if (name := file.name)[:4].isdecimal())


def _revision(connection: Connection) -> str | None:
    """What Alembic noted when it changed the schema last; None of a new index."""
    noted = "SELECT version_num FROM alembic_version"
    is_there = "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"
    if connection.exec_driver_sql(is_there).scalar() is None:
        return None
    return connection.exec_driver_sql(noted).scalar()


def _upgrade(connection: Connection) -> None:
    """SQLAlchemyError if this narseal does not know the schema."""
    # 11 MB, for a moment in an index's life
    import alembic.command
    import alembic.config

    config = alembic.config.Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    try:
        alembic.command.upgrade(config, "head")
    except alembic.util.CommandError as error:
        raise SQLAlchemyError(str(error)) from error


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
                raise ConfigError(f"{target} is there already, and stays: name another file")
            if not target.parent.is_dir():
                raise cannot_make(target, FileNotFoundError())
            with closing(sqlite3.connect(target)) as copy:
                source.backup(copy)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"{target}: {error}") from error


def _engine(file: Path, mode: str) -> Engine:
    """Connections with full durability, in which transactions begin when we say so.

    With the mode `rw` none makes an empty database.
    """

    def driver() -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{quote(str(file))}?mode={mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=_BUSY_MS / 1000,
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    return create_engine("sqlite://", creator=driver, poolclass=NullPool)


def connect(file: Path) -> Connection:
    """A connection of which SQLAlchemy begins and ends no transactions.

    Whoever uses it in several threads sees to it that no two do at the same time.
    """
    return _engine(file, "rw").connect().execution_options(isolation_level="AUTOCOMMIT")


@contextmanager
def _transaction(driver: sqlite3.Connection) -> Iterator[None]:
    """One that waits for others' to end: committed on leaving, rolled back by an error."""
    driver.execute(_BEGIN)
    try:
        yield
        driver.execute("COMMIT")
    finally:
        _roll_back(driver)


def _roll_back(driver: sqlite3.Connection) -> None:
    """End a transaction that failed; nothing if it ended by itself."""
    if driver.in_transaction:
        with suppress(sqlite3.Error):
            driver.execute("ROLLBACK")


class _Lane:
    """A thread with a connection of its own, for what may take long."""

    def __init__(self, file: Path, name: str) -> None:
        self._file = file
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._connection: Connection | None = None

    async def run(self, work: Callable[[Connection], T]) -> T:
        """`work` on the connection; in the order of calls."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)

    def _run(self, work: Callable[[Connection], T]) -> T:
        if self._connection is None:
            self._connection = connect(self._file)
        return work(self._connection)

    async def close(self) -> None:
        """Wait for what runs, also for callers that are gone."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()


class Engines:
    """The connections to one index file, and their threads. Unavailable when the database fails."""

    def __init__(self, url: str, presence: Presence) -> None:
        self._presence = presence
        self._file = file = index_file(url)
        self._writes: Batcher[Write[Any], Any] = Batcher(self._commit, most=_GROUP)
        self._committing = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._questions = _Lane(file, "questions")
        self._surveys = _Lane(file, "surveys")
        self._long_writes = _Lane(file, "long writes")
        self._checkpoints = _Lane(file, "checkpoints")
        self._checkpointing: asyncio.Task[None] | None = None
        self._checkpointed = monotonic()

    # each is opened when it is first used: a worker starts without an index, too, and serves nothing

    @cached_property
    def _reading(self) -> Connection:
        return connect(self._file)

    @cached_property
    def _writing(self) -> Connection:
        connection = connect(self._file)
        driver_of(connection).execute("PRAGMA busy_timeout=0")  # nobody waits on the loop
        driver_of(connection).execute("PRAGMA wal_autocheckpoint=0")
        # how a statement with triggers is taken back; those that are run here touch few pages
        driver_of(connection).execute("PRAGMA temp_store=MEMORY")
        return connection

    def first(self, statement: Prepared, **values: Any) -> Any:
        """The first row of a point read, on the loop; None if there is none."""
        return self._read(statement.first, values)

    def all(self, statement: Prepared, **values: Any) -> list[Any]:
        """All rows of a read that gives few, on the loop."""
        return self._read(statement.all, values)

    def _read(self, ask: Callable[..., T], values: dict[str, Any]) -> T:
        self._presence.check()
        try:
            return ask(self._reading, **values)
        except FAULTS as error:
            raise Unavailable(f"the index cannot be read: {error}") from error

    async def ask(self, query: Select[Any]) -> list[Row[Any]]:
        """All rows of a rare question, in a thread."""
        return await self._asked(self._questions, query)

    async def survey(self, query: Select[Any]) -> list[Row[Any]]:
        """The same of one that may take long, so that no other waits for it."""
        return await self._asked(self._surveys, query)

    async def pages(self, key: Column[str], size: int) -> AsyncIterator[ColumnElement[bool]]:
        """Conditions that take in all rows of a table, so many at a time, in the order of a key.

        Whatever else is asked of a page, no question takes long.
        """
        after = ""
        while True:
            place = select(key.label("key")).where(key > after).order_by(key)
            last = await self.survey(place.offset(size - 1).limit(1))
            if not last:
                yield key > after
                return
            yield (key > after) & (key <= last[0].key)
            after = last[0].key

    async def _asked(self, lane: _Lane, query: Select[Any]) -> list[Row[Any]]:
        self._presence.check()
        try:
            return await lane.run(lambda c: list(c.execute(query)))
        except FAULTS as error:
            raise Unavailable(f"the index cannot be read: {error}") from error

    async def write(self, work: Write[T]) -> T:
        """Run `work`, which is short, in a transaction on the loop; its result once that is on disk.

        Works that come at the same time share a transaction. A work that raises an error of
        ours leaves what it wrote so far, which must do no harm, and its error reaches its caller
        only; Unavailable if the index cannot be written.
        """
        try:
            return await self._writes.ask(work)  # type: ignore[no-any-return]
        except FAULTS as error:
            raise Unavailable(f"the index cannot be written: {error}") from error

    async def write_long(self, work: Write[T]) -> T:
        """The same in a thread, in a transaction of its own: for what writes much or looks at files.

        An error takes all back.
        """

        def done(connection: Connection) -> T:
            with _transaction(driver_of(connection)):
                return work(connection)

        self._presence.check()
        try:
            result = await self._long_writes.run(done)
        except FAULTS as error:
            raise Unavailable(f"the index cannot be written: {error}") from error
        self._presence.check(is_anew=True)
        return result

    async def run(self) -> None:
        """The one writer; runs until closed, then lets go of every connection."""
        await self._writes.run()
        if self._checkpointing:
            await self._checkpointing
        for lane in (self._questions, self._surveys, self._long_writes, self._checkpoints):
            await lane.close()
        self._committing.shutdown()  # it is idle
        for name in ("_reading", "_writing"):
            if name in vars(self):
                getattr(self, name).close()

    async def close(self) -> None:
        """Let `run` end once it wrote what was asked before."""
        await self._writes.close()

    async def _commit(self, works: list[Write[Any]]) -> list[Any]:
        self._presence.check()
        outcomes: list[Any] = []
        writer = driver_of(self._writing)
        try:
            await self._begin(writer)
            began = monotonic()
            for work in works:
                try:
                    outcomes.append(work(self._writing))
                except NarsealError as error:
                    outcomes.append(error)
                if monotonic() - began > _LONGEST:
                    await asyncio.sleep(0)
                    began = monotonic()
            await self._in_thread(partial(writer.execute, "COMMIT"))
        finally:
            _roll_back(writer)
        self._presence.check(is_anew=True)  # else it was committed to a file that nobody will read
        if not self._checkpointing and monotonic() - self._checkpointed > _CHECKPOINTS:
            self._checkpointing = asyncio.create_task(self._checkpoint())
        return outcomes

    async def _begin(self, writer: sqlite3.Connection) -> None:
        """Begin a transaction, in a thread if another process has one."""
        try:
            writer.execute(_BEGIN)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            await self._in_thread(partial(_begin_patiently, writer))

    async def _checkpoint(self) -> None:
        """Copy what was committed into the database, as far as nobody reads it in the log."""
        try:
            await self._checkpoints.run(
                lambda c: driver_of(c).execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            )
        except FAULTS as error:
            _log.warning("the index's log grows, since it cannot be copied: %s", error)
        finally:
            self._checkpointing = None
            self._checkpointed = monotonic()

    async def _in_thread(self, work: Callable[[], object]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._committing, work)


def _begin_patiently(writer: sqlite3.Connection) -> None:
    writer.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
    try:
        writer.execute(_BEGIN)
    finally:
        writer.execute("PRAGMA busy_timeout=0")

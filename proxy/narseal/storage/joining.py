"""Index and folder belong together: both bear one mark, and are compared before anything is served.

A folder that is not mounted, or is another's, has none of the files; an index that was lost knows
none of the paths. Neither is to be taken for the truth about the other.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from narseal.errors import ConfigError, Unavailable
from narseal.nix.cache_info import CacheInfo
from narseal.storage.engine import migrate, migrate_present
from narseal.storage.local import LocalStorage
from narseal.storage.marks import IndexMark, has_table, opened, read_mark, write_mark
from narseal.storage.presence import index_file

_SAMPLE = 32  # files by which a folder is known that was never marked


@dataclass(frozen=True, slots=True)
class _Known:
    """What an index knows."""

    is_there: bool = False
    has_paths: bool = False
    mark: IndexMark = field(default_factory=IndexMark)


def join(url: str, storage: LocalStorage, info: CacheInfo) -> None:
    """Make the index at `url` and the folder ready to serve from, as one.

    A folder that was never marked is known by its files. ConfigError if the two are not of each
    other, or cannot be used; nothing was written then.
    """
    _agreed(url, storage)
    migrate(url)
    storage.prepare(info)
    join_present(url, storage)


def join_present(url: str, storage: LocalStorage) -> None:
    """The same for an index of the newest schema and a folder that is prepared, or served from."""
    mark = _agreed(url, storage)
    if read_mark(index_file(url)).joined != mark or storage.mark() != mark:
        _mark_both(url, storage, mark)


def join_for_rebuild(url: str, storage: LocalStorage, info: CacheInfo) -> None:
    """The same for an index that is to be made from the folder.

    One that knows no path takes the folder with the mark that it has.
    """
    if _known(index_file(url)).has_paths:
        join(url, storage, info)
        return
    migrate(url)
    storage.prepare(info)
    _mark_both(url, storage, storage.mark() or secrets.token_hex(16))


def join_if_known(url: str, storage: LocalStorage) -> None:
    """The same for commands, without preparing the folder.

    One that is not the index's is no error: that is found out where the folder matters. NoIndex if
    there is no index.
    """
    migrate_present(url)
    with suppress(ConfigError):
        join_present(url, storage)


def take(url: str, storage: LocalStorage, info: CacheInfo) -> tuple[int, int]:
    """Make a folder the index's own as it is; how many of so many stored NARs it has.

    On the operator's word alone. The mark is a new one: what bore the old one is not taken for it.
    """
    migrate_present(url)
    storage.prepare(info)
    _mark_both(url, storage, secrets.token_hex(16))
    with opened(index_file(url)) as connection:
        stored = connection.execute("SELECT file, file_size FROM nar WHERE stored").fetchall()
    return sum(_has(storage, file, size) for file, size in stored), len(stored)


def _agreed(url: str, storage: LocalStorage) -> str:
    """The mark that both bear, or are to bear; ConfigError if they are not of each other."""
    file = index_file(url)
    try:
        known, there = _known(file), storage.mark()
        mark = known.mark.mark
        if not known.has_paths:
            _check_founded(file, storage, known)
        if mark is not None and mark == there:
            return mark
        if known.mark.is_settled:
            raise ConfigError(_not_its_own(file, storage, there))
        if known.has_paths and not _is_known_by_its_files(file, storage, there):
            raise ConfigError(_not_its_own(file, storage, there))
    except (OSError, Unavailable) as error:
        raise ConfigError(f"storage.url {storage.root}: {error}") from error
    return there or mark or secrets.token_hex(16)


def _check_founded(file: Path, storage: LocalStorage, known: _Known) -> None:
    """ConfigError if an index that knows nothing is beside a folder that had another.

    An index that begins anew would pin other content, and serve what was revoked.
    """
    # after a crash a NAR can be there of which the index knows nothing yet, a narinfo cannot
    held = storage.holds(nars=not known.is_there)
    if held is None and storage.mark() not in (None, known.mark.mark):
        held = "the mark of another index"
    if held:
        raise ConfigError(
            f"storage.index {file} is {'empty' if known.is_there else 'missing'}, and"
            f" {storage.root} holds {held}: what was pinned and revoked is not known. Put a backup"
            " of the index back, or run `narseal index rebuild` and revoke again what was revoked"
            " (docs/recovery.md); to begin with nothing, empty the folder, .narseal too"
        )


def _not_its_own(file: Path, storage: LocalStorage, there: str | None) -> str:
    how = "bears the mark of another index" if there else "does not bear its mark"
    return (
        f"storage.url {storage.root} is not the folder of storage.index {file}: it {how}. Is it"
        " mounted, and are both settings right? If its files are lost, or you moved them without"
        " .narseal, let the index have this folder as it is with `narseal index join`: what it"
        " lacks is fetched again, and uploads that it lacks are withdrawn (docs/recovery.md)"
    )


def _known(file: Path) -> _Known:
    try:
        if not file.stat().st_size:
            return _Known(is_there=True)
    except FileNotFoundError:
        return _Known()
    except OSError as error:
        raise ConfigError(f"storage.index {file}: {error.strerror}") from error
    with opened(file) as connection:
        paths = has_table(connection, "path")
        has_paths = paths and bool(connection.execute("SELECT 1 FROM path LIMIT 1").fetchone())
    return _Known(True, has_paths, read_mark(file))


def _is_known_by_its_files(file: Path, storage: LocalStorage, there: str | None) -> bool:
    """Whether at least half of some files that the index says are stored are in a folder.

    Where it says of none, the folder's mark must not be `there`: it would be another index's.
    """
    query = "SELECT file, file_size FROM nar WHERE stored ORDER BY random() LIMIT ?"
    with opened(file) as connection:
        sample = connection.execute(query, [_SAMPLE]).fetchall()
    if not sample:  # every folder that a narseal prepared has this
        return there is None and storage.path(".narseal").is_dir()
    return 2 * sum(_has(storage, name, size) for name, size in sample) >= len(sample)


def _has(storage: LocalStorage, file: str, size: int | None) -> bool:
    try:
        return storage.path(f"nar/{file}").stat().st_size == size
    except (FileNotFoundError, NotADirectoryError):
        return False


def _mark_both(url: str, storage: LocalStorage, mark: str) -> None:
    """The index first: a mark in the folder alone would look like an index that was lost."""
    file = index_file(url)
    write_mark(file, IndexMark(mark, is_settled=False))
    try:
        storage.bear(mark)
    except Unavailable as error:
        raise ConfigError(f"storage.url {storage.root}: cannot be written: {error}") from error
    write_mark(file, IndexMark(mark, is_settled=True))

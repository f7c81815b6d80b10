"""A storage folder that is not mounted, or not the index's: nothing counts as lost because of it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_process import cache_of, fetch, strace
from tests.faults.test_storage_faults import (
    ITEMS,
    counted,
    delete_all,
    fill,
)
from tests.tools.cache import entry
from tests.tools.command import narseal_command
from tests.tools.narseal import UPSTREAM, narseal_process, render_toml, settings
from tests.tools.waiting import until


def unmount(folder: Path) -> None:
    """An empty mount point."""
    folder.rename(folder.with_name("volume"))
    folder.mkdir()


def lose(folder: Path) -> None:
    folder.rename(folder.with_name("volume"))


def mount_another(folder: Path) -> None:
    """Another narseal's, of the same form and with the same names in it."""
    other = _copied(folder)
    for file in (other / "nar").iterdir():
        file.write_bytes(os.urandom(100))
    (other / ".narseal/identity").write_text("another\n")
    _exchange(folder, other)


def mount_a_copy(folder: Path) -> None:
    """One with the same files, which bears no mark: both would be written from now on."""
    other = _copied(folder)
    (other / ".narseal/identity").unlink()
    _exchange(folder, other)


def _copied(folder: Path) -> Path:
    """Elsewhere: what is half a copy must not lie where narseal looks."""
    return Path(shutil.copytree(folder, folder.with_name("other")))


def _exchange(folder: Path, other: Path) -> None:
    folder.rename(folder.with_name("volume"))
    other.rename(folder)


def mount(folder: Path) -> None:
    """The right one again."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name("volume").rename(folder)


DAMAGE = pytest.mark.parametrize("damage", [unmount, lose, mount_another])


def state(folder: Path) -> dict[Path, bytes | None] | None:
    """All that is below a folder; None if it is not there."""
    if not folder.exists():
        return None
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def change(folder: Path, statement: str) -> None:
    with closing(sqlite3.connect(folder / "index.sqlite")) as index:
        index.executescript(statement)
        index.commit()


def rows(folder: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(folder / "index.sqlite")) as index:
        return index.execute(query).fetchall()


def uploaded(folder: Path) -> None:
    """As if everything had been uploaded: no upstream has it."""
    change(folder, "UPDATE nar SET url = '', upstream = ''; UPDATE path SET evidence = 'upload x'")


def assert_nothing_was_struck(folder: Path) -> None:
    assert rows(folder, "SELECT count(*) FROM path WHERE NOT withdrawn") == [(len(ITEMS),)]
    assert rows(folder, "SELECT count(*) FROM nar WHERE stored") == [(len(ITEMS),)]
    assert not list((folder / "storage/.narseal/quarantine").iterdir())


@pytest.mark.parametrize("damage", [unmount, lose, mount_another, mount_a_copy])
def test_no_start_on_a_folder_that_is_not_the_indexs(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    upstream = cache_of(tmp_path, *ITEMS)
    with narseal_process(tmp_path, upstream) as proxy:
        fill(proxy)
    uploaded(tmp_path)
    storage = tmp_path / "storage"
    damage(storage)
    before = state(storage)
    config = str(tmp_path / "narseal.toml")
    for command in (("serve",), ("index", "rebuild")):
        refused = narseal_command(*command, "--config", config)
        assert refused.returncode == 2, refused.stdout
        assert "mounted" in refused.stderr and "narseal index join" in refused.stderr
        assert state(storage) == before
    checked = narseal_command("index", "check", "--config", config)
    assert (checked.returncode, checked.stdout) == (1, "1 problems\n")
    assert "narseal index join" in checked.stderr
    mount(storage)
    assert_nothing_was_struck(tmp_path)
    with narseal_process(tmp_path, upstream) as proxy:
        for item in ITEMS:
            assert fetch(f"{proxy.url}/{item.info.url}") == (200, item.file)


@DAMAGE
def test_a_folder_that_goes_away_while_narseal_serves_loses_nothing(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    upstream = cache_of(tmp_path, *ITEMS)
    late = entry("late", b"late").signed(UPSTREAM)
    cache_of(tmp_path, late)
    with narseal_process(tmp_path, upstream, workers=2) as proxy:
        fill(proxy)
        assert counted(proxy, "narseal_storage_present") == 1
        uploaded(tmp_path)
    with narseal_process(tmp_path, upstream, workers=2) as proxy:
        assert fetch(f"{proxy.url}/{ITEMS[0].info.url}") == (200, ITEMS[0].file)  # it is known now
        storage = tmp_path / "storage"
        damage(storage)
        before = state(storage)
        for item in [*ITEMS, *ITEMS]:
            status, text = fetch(f"{proxy.url}/{item.info.url}")
            assert status == 503, text
            assert b"is it mounted?" in text
        until(lambda: counted(proxy, "narseal_storage_present") == 0)
        until(lambda: counted(proxy, 'narseal_storage_errors_total{kind="gone"}') == 2)
        assert counted(proxy, 'narseal_storage_errors_total{kind="lost"}') == 0
        until(lambda: proxy.log.read_text().count("what is stored is not served") == 2)
        assert fetch(f"{proxy.url}/readyz")[0] == 503
        assert fetch(f"{proxy.url}/{ITEMS[0].hash}.narinfo")[0] == 200
        # what is new, and small, is answered; it is not kept where it does not belong
        assert fetch(f"{proxy.url}/{late.hash}.narinfo")[0] == 200
        assert fetch(f"{proxy.url}/{late.info.url}") == (200, late.file)
        until(lambda: "small NARs are not kept" in proxy.log.read_text())
        assert fetch(f"{proxy.url}/{ITEMS[0].hash}.ls")[0] == 503
        assert state(storage) == before
        mount(storage)
        until(lambda: fetch(f"{proxy.url}/readyz")[0] == 200)
        for item in [*ITEMS, late]:
            assert fetch(f"{proxy.url}/{item.info.url}") == (200, item.file)
        until(lambda: counted(proxy, "narseal_storage_present") == 1)
    assert rows(tmp_path, "SELECT count(*) FROM path WHERE withdrawn") == [(0,)]
    assert rows(tmp_path, "SELECT count(*) FROM nar WHERE stored") == [(len(ITEMS) + 1,)]
    assert not list((storage / ".narseal/quarantine").iterdir())


def test_the_scrub_strikes_nothing_of_a_folder_that_is_away(tmp_path: Path) -> None:
    items = [entry(f"small{n}", os.urandom(1_000)).signed(UPSTREAM) for n in range(12)]
    upstream = cache_of(tmp_path, *items)
    with narseal_process(tmp_path, upstream, storage={"scrub_rate": "0"}) as proxy:
        for item in items:
            assert fetch(f"{proxy.url}/{item.hash}.narinfo")[0] == 200
            assert fetch(f"{proxy.url}/{item.info.url}")[0] == 200
    uploaded(tmp_path)
    with narseal_process(tmp_path, upstream, storage={"scrub_rate": "200"}) as proxy:  # one in 5 s
        unmount(tmp_path / "storage")
        until(lambda: "stored NARs cannot be looked at" in proxy.log.read_text())
        assert rows(tmp_path, "SELECT count(*) FROM nar WHERE stored") == [(len(items),)]
        assert rows(tmp_path, "SELECT count(*) FROM path WHERE withdrawn") == [(0,)]
        mount(tmp_path / "storage")


def test_revoking_while_the_folder_is_away_goes_on_when_it_is_there(tmp_path: Path) -> None:
    """Its narinfos would keep the revoked signatures, and no row would say so any more."""
    upstream = cache_of(tmp_path, *ITEMS)
    with narseal_process(tmp_path, upstream) as proxy:
        fill(proxy)
    command = ("revoke", UPSTREAM.name, "--reason", "stolen")
    config = str(tmp_path / "narseal.toml")
    storage = tmp_path / "storage"
    unmount(storage)
    before = state(storage)
    done = narseal_command(*command, "--config", config)
    assert done.returncode == 3, done.stderr
    assert "is it mounted?" in done.stderr
    assert state(storage) == before
    assert rows(tmp_path, "SELECT count(*) FROM path WHERE withdrawn") == [(len(ITEMS),)]
    mount(storage)
    assert len(list(storage.glob("*.narinfo"))) == len(ITEMS)
    done = narseal_command(*command, "--config", config)
    assert done.returncode == 1 and f"taken off {len(ITEMS)} paths" in done.stdout
    assert not list(storage.glob("*.narinfo"))


def test_revoking_withdraws_nothing_that_it_could_not_look_at(tmp_path: Path) -> None:
    """An upload that bears a revoked key's signature is held to its content: that must be there."""
    upstream = cache_of(tmp_path, *ITEMS)
    with narseal_process(tmp_path, upstream) as proxy:
        fill(proxy)
        uploaded(tmp_path)
        unmount(tmp_path / "storage")
        config = str(tmp_path / "narseal.toml")
        command = ("revoke", UPSTREAM.name, "--reason", "stolen", "--config", config)
        assert narseal_command(*command).returncode == 3
        for item in ITEMS:
            assert fetch(f"{proxy.url}/{item.hash}.narinfo")[0] == 503
        mount(tmp_path / "storage")
        assert narseal_command(*command).returncode == 0
        for item in ITEMS:
            assert fetch(f"{proxy.url}/{item.hash}.narinfo")[0] == 200
    assert_nothing_was_struck(tmp_path)


def unmarked(folder: Path) -> None:
    """Index and folder as an earlier release left them."""
    with closing(sqlite3.connect(folder / "index.sqlite")) as connection:
        names = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'trigger'"
        ).fetchall()
    triggers = "".join(f"DROP TRIGGER {name};" for (name,) in names)
    counts = "DROP TABLE served; ALTER TABLE total DROP COLUMN waiting;"
    old = "DROP TABLE folder; UPDATE alembic_version SET version_num = '0005'"
    change(folder, triggers + counts + old)
    (folder / "storage/.narseal/identity").unlink()


def test_a_folder_of_an_earlier_release_is_known_by_its_files(tmp_path: Path) -> None:
    upstream = cache_of(tmp_path, *ITEMS)
    with narseal_process(tmp_path, upstream) as proxy:
        fill(proxy)
    unmarked(tmp_path)
    lost = tmp_path / "storage" / ITEMS[0].info.url
    lost.unlink()  # one of four
    with narseal_process(tmp_path, upstream) as proxy:
        for item in ITEMS:
            assert fetch(f"{proxy.url}/{item.info.url}") == (200, item.file)
    mark = (tmp_path / "storage/.narseal/identity").read_text().strip()
    assert rows(tmp_path, "SELECT mark, settled FROM folder") == [(mark, 1)]


def test_a_command_knows_a_folder_of_an_earlier_release_too(tmp_path: Path) -> None:
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS)) as proxy:
        fill(proxy)
    unmarked(tmp_path)
    command = ("revoke", UPSTREAM.name, "--reason", "stolen")
    assert narseal_command(*command, "--config", str(tmp_path / "narseal.toml")).returncode == 1
    assert not list((tmp_path / "storage").glob("*.narinfo"))


@pytest.mark.parametrize("how", ["unmounted", "lost", "another's"])
def test_no_start_on_a_folder_of_an_earlier_release_that_is_not_plainly_its_own(
    how: str, tmp_path: Path
) -> None:
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS)) as proxy:
        fill(proxy)
    unmarked(tmp_path)
    storage = tmp_path / "storage"
    if how == "another's":  # that has one NAR of the same upstream, too
        for item in ITEMS[1:]:
            (storage / item.info.url).unlink()
    else:
        (unmount if how == "unmounted" else lose)(storage)
    before = state(storage)
    refused = narseal_command("serve", "--config", str(tmp_path / "narseal.toml"))
    assert refused.returncode == 2
    assert "mounted" in refused.stderr and "narseal index join" in refused.stderr
    assert state(storage) == before


@pytest.mark.parametrize("marked", [True, False])
def test_a_crash_between_the_two_marks_is_mended_at_the_next_start(
    marked: bool, tmp_path: Path
) -> None:
    upstream = cache_of(tmp_path, *ITEMS)
    with narseal_process(tmp_path, upstream):
        pass
    change(tmp_path, "UPDATE folder SET settled = 0")
    if not marked:
        (tmp_path / "storage/.narseal/identity").unlink()
    with narseal_process(tmp_path, upstream) as proxy:
        fill(proxy)
    assert rows(tmp_path, "SELECT settled FROM folder") == [(1,)]


def test_a_folder_whose_files_are_lost_is_taken_on_the_operators_word(tmp_path: Path) -> None:
    upstream = cache_of(tmp_path, *ITEMS)
    with narseal_process(tmp_path, upstream) as proxy:
        fill(proxy)
        config = str(tmp_path / "narseal.toml")
        busy = narseal_command("index", "join", "--config", config)
        assert busy.returncode == 2 and "another narseal serves from it" in busy.stderr
    storage = tmp_path / "storage"
    lose(storage)
    assert narseal_command("serve", "--config", config).returncode == 2
    joined = narseal_command("index", "join", "--config", config)
    assert (joined.returncode, joined.stdout) == (
        0,
        f"joined: 0 of 4 stored NARs are in {storage}\n",
    )
    with narseal_process(tmp_path, upstream) as proxy:
        for item in ITEMS:
            assert fetch(f"{proxy.url}/{item.info.url}") == (200, item.file)
    mount(storage)  # what was lost comes back: it is not the index's any more
    assert narseal_command("serve", "--config", config).returncode == 2


def test_a_moved_folder_is_taken_on_the_operators_word(tmp_path: Path) -> None:
    upstream = cache_of(tmp_path, *ITEMS)
    with narseal_process(tmp_path, upstream) as proxy:
        fill(proxy)
    shutil.rmtree(tmp_path / "storage/.narseal")
    config = str(tmp_path / "narseal.toml")
    assert narseal_command("serve", "--config", config).returncode == 2
    assert narseal_command("index", "join", "--config", config).stdout.startswith("joined: 4 of 4 ")
    assert narseal_command("index", "check", "--content", "--config", config).stdout == "good\n"


def test_a_backup_of_the_index_keeps_its_folder(tmp_path: Path) -> None:
    upstream = cache_of(tmp_path, *ITEMS)
    config = str(tmp_path / "narseal.toml")
    with narseal_process(tmp_path, upstream) as proxy:
        fill(proxy)
        copy = tmp_path / "copy"
        assert narseal_command("index", "backup", str(copy), "--config", config).returncode == 0
        again = narseal_command("index", "backup", str(copy), "--config", config)
        assert again.returncode == 2 and "name another file" in again.stderr
        nowhere = str(tmp_path / "gone/copy")
        lost = narseal_command("index", "backup", nowhere, "--config", config)
        assert lost.returncode == 2 and f"no folder {tmp_path}/gone; make it" in lost.stderr
    delete_all(tmp_path / "index.sqlite")
    copy.rename(tmp_path / "index.sqlite")
    assert narseal_command("index", "check", "--config", config).stdout == "good\n"
    with narseal_process(tmp_path, upstream) as proxy:
        assert fetch(f"{proxy.url}/{ITEMS[0].info.url}") == (200, ITEMS[0].file)


def test_a_lost_index_is_noticed_beside_a_folder_without_paths(tmp_path: Path) -> None:
    """What was revoked in it would be forgotten, whatever the folder holds."""
    upstream = cache_of(tmp_path, *ITEMS)
    with narseal_process(tmp_path, upstream):
        pass
    delete_all(tmp_path / "index.sqlite")
    config = str(tmp_path / "narseal.toml")
    refused = narseal_command("serve", "--config", config)
    assert refused.returncode == 2 and "narseal index rebuild" in refused.stderr
    rebuilt = narseal_command("index", "rebuild", "--config", config)
    assert rebuilt.returncode == 0 and "has no narinfos" in rebuilt.stdout
    with narseal_process(tmp_path, upstream) as proxy:
        fill(proxy)


def test_a_folder_by_mistake_is_not_mixed_with_anothers(tmp_path: Path) -> None:
    """Two narseals, and one's `storage.url` is written as the other's."""
    there = {name: cache_of(tmp_path / name, *ITEMS) for name in ("one", "two")}
    for name, upstream in there.items():
        with narseal_process(tmp_path / name, upstream) as proxy:
            fill(proxy)
    tree = settings(tmp_path / "one", there["one"])
    tree["storage"]["url"] = f"file://{tmp_path}/two/storage"
    file = tmp_path / "one/narseal.toml"
    file.write_text(render_toml(tree))
    before = state(tmp_path / "two/storage")
    for command in (("serve",), ("index", "rebuild")):
        refused = narseal_command(*command, "--config", str(file))
        assert refused.returncode == 2 and "the mark of another index" in refused.stderr
    assert state(tmp_path / "two/storage") == before


def test_a_passing_fault_of_the_disk_is_no_folder_that_is_gone(tmp_path: Path) -> None:
    upstream = cache_of(tmp_path, *ITEMS)
    with narseal_process(tmp_path, upstream) as proxy:
        fill(proxy)
        root = str(tmp_path / "storage")
        inject = "inject=openat:error=EIO"
        with strace(proxy, "-P", root, "-e", "trace=openat", "-e", inject, "-o", "/dev/null"):
            until(lambda: "whether the storage folder is in its place" in proxy.log.read_text())
        until(lambda: fetch(f"{proxy.url}/readyz")[0] == 200)
        assert counted(proxy, 'narseal_storage_errors_total{kind="gone"}') == 0
        assert "what is stored is not served" not in proxy.log.read_text()


def test_an_index_that_cannot_be_looked_at_is_named(tmp_path: Path) -> None:
    """The error was said to be the folder's."""
    (tmp_path / "file").touch()
    tree = settings(tmp_path, cache_of(tmp_path, *ITEMS))
    tree["storage"]["index"] = f"sqlite:///{tmp_path}/file/index.sqlite"
    file = tmp_path / "narseal.toml"
    file.write_text(render_toml(tree))
    for command in (("serve",), ("index", "rebuild")):
        refused = narseal_command(*command, "--config", str(file))
        assert refused.returncode == 2, refused.stderr
        assert f"storage.index {tmp_path}/file/index.sqlite: Not a directory" in refused.stderr


def test_an_index_without_a_mark_takes_no_folder_that_bears_anothers(tmp_path: Path) -> None:
    """Of an earlier release: it has a path, and its NAR was not fetched."""
    first, second = tmp_path / "first", tmp_path / "second"
    with narseal_process(first, cache_of(first, *ITEMS)) as proxy:
        urllib.request.urlopen(f"{proxy.url}/{ITEMS[0].hash}.narinfo").read()
    unmarked(first)
    with narseal_process(second, cache_of(second, *ITEMS)) as proxy:
        fill(proxy)
    (first / "storage").rename(first / "own")
    (second / "storage").rename(first / "storage")
    refused = narseal_command("serve", "--config", str(first / "narseal.toml"))
    assert refused.returncode == 2
    assert "bears the mark of another index" in refused.stderr

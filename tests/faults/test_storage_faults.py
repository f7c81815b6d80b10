"""What storage does to a narseal that runs: an index that vanishes, bits that rot, disks that fail."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.faults.test_process import BIG, cache_of, fetch, strace
from tests.faults.test_uploads import uploading
from tests.tools.cache import Entry, entry
from tests.tools.command import narseal_command
from tests.tools.narseal import (
    UPSTREAM,
    Process,
    metric,
    narseal_process,
    render_toml,
    settings,
)
from tests.tools.waiting import until

ITEMS = [entry(f"item{n}", os.urandom(90_000)).signed(UPSTREAM) for n in range(4)]
SMALL = entry("small", os.urandom(2_000)).signed(UPSTREAM)


def fill(proxy: Process, *more: Entry) -> None:
    """All of ITEMS in storage, their narinfos in a worker's memory."""
    for item in [*ITEMS, *more]:
        assert fetch(f"{proxy.url}/{item.hash}.narinfo")[0] == 200
        assert fetch(f"{proxy.url}/{item.info.url}") == (200, item.file)
        until((proxy.folder / "storage" / f"{item.hash}.narinfo").exists)


def delete(index: Path) -> None:
    index.unlink()


def delete_all(index: Path) -> None:
    for file in index.parent.glob("index.*"):
        file.unlink()


def replace(index: Path) -> None:
    shutil.copy(index, index.with_name("copy"))
    index.with_name("copy").rename(index)


def move(index: Path) -> None:
    index.rename(index.with_name("elsewhere"))


def delete_epoch(index: Path) -> None:
    index.with_suffix(".epoch").unlink()


@pytest.mark.parametrize("damage", [delete, delete_all, replace, move, delete_epoch])
def test_an_index_that_vanishes_is_noticed(damage: object, tmp_path: Path) -> None:
    index = tmp_path / "index.sqlite"
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS), workers=2) as proxy:
        fill(proxy)
        assert callable(damage)
        damage(index)
        log = proxy.log
        until(lambda: log.read_text().count("nothing is served") == 2)  # one of each worker
        names = [
            f"{ITEMS[0].hash}.narinfo",
            ITEMS[0].info.url,
            "readyz",
            "pubkey",
            "keys",
            "status",
        ]
        for name in names * 8:  # every worker; each of these came from memory before, or could have
            status, text = fetch(f"{proxy.url}/{name}")
            assert status == 503, name
            assert b"narseal index rebuild" in text
        assert fetch(f"{proxy.url}/healthz")[0] == 200
        assert b"\nnarseal_index_present 0.0" in fetch(f"{proxy.url}/metrics")[1]
        is_there = index.exists()
        os.kill(proxy.workers()[0], signal.SIGKILL)  # a restarted worker takes no other one either
        until(lambda: log.read_text().count("nothing is served") == 3)
        for _ in range(20):
            assert fetch(f"{proxy.url}/{ITEMS[0].hash}.narinfo")[0] == 503
        assert index.exists() == is_there


def test_an_index_that_comes_back_is_used_again(tmp_path: Path) -> None:
    index = tmp_path / "index.sqlite"
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS)) as proxy:
        fill(proxy)
        target = f"{proxy.url}/{ITEMS[0].hash}.narinfo"
        move(index)
        until(lambda: fetch(target)[0] == 503)
        index.with_name("elsewhere").rename(index)
        until(lambda: fetch(target)[0] == 200)


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_no_start_on_a_new_index_beside_a_full_folder(how: str, tmp_path: Path) -> None:
    index = tmp_path / "index.sqlite"
    upstream = cache_of(tmp_path, *ITEMS)
    with narseal_process(tmp_path, upstream) as proxy:
        fill(proxy)
    config = str(tmp_path / "narseal.toml")
    delete_all(index)
    if how == "empty":
        index.touch()
    size = index.stat().st_size if index.exists() else None
    refused = narseal_command("serve", "--config", config)
    assert refused.returncode == 2
    assert "narseal index rebuild" in refused.stderr and "docs/recovery.md" in refused.stderr
    assert (index.stat().st_size if index.exists() else None) == size
    assert narseal_command("index", "rebuild", "--config", config).stdout.startswith(
        f"put back {len(ITEMS)} "
    )
    assert (
        narseal_command(
            "revoke", "up-9", "--unknown", "--reason", "x", "--config", config
        ).returncode
        == 0
    )
    with narseal_process(tmp_path, upstream) as proxy:
        for item in ITEMS:
            assert fetch(f"{proxy.url}/{item.info.url}") == (200, item.file)


@pytest.mark.parametrize(
    "command",
    [("index", "check"), ("index", "check", "--content"), ("index", "backup"),
     ("policy", "test", str(ITEMS[0].info.store_path)), ("revoke", "up-9", "--reason", "x")],
)  # fmt: skip
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_what_is_about_an_index_makes_none(
    how: str, command: tuple[str, ...], tmp_path: Path
) -> None:
    """An empty one was made: what was revoked in it was not in the one that was put back later."""
    file = tmp_path / "narseal.toml"
    file.write_text(render_toml(settings(tmp_path, cache_of(tmp_path, *ITEMS))))
    if how == "empty":
        (tmp_path / "index.sqlite").touch()
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    words = (*command, str(tmp_path / "copy")) if command == ("index", "backup") else command
    done = narseal_command(*words, "--config", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no index" in done.stderr and "narseal index rebuild" in done.stderr
    assert {path: path.stat().st_size for path in tmp_path.rglob("*")} == before


def test_a_folder_with_a_nar_that_a_crash_left_is_started_on(tmp_path: Path) -> None:
    """Between the rename of the first NAR and its row: the index is there, and has no path."""
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS)):
        pass
    (tmp_path / "storage" / ITEMS[0].info.url).write_bytes(ITEMS[0].file)
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS)) as proxy:
        fill(proxy)


def rot(file: Path) -> None:
    """One bit, the size as before."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def counted(proxy: Process, name: str) -> float:
    lines = fetch(f"{proxy.url}/metrics")[1].decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def long_ago(folder: Path, value: float | None) -> None:
    """What the index looks like when nothing was hashed since a time, or since before it knew."""
    with closing(sqlite3.connect(folder / "index.sqlite")) as index:
        index.execute("UPDATE nar SET verified_at = ?", [value])
        index.commit()


@pytest.mark.parametrize("since", [None, 0.0, 1e12], ids=["never", "long-ago", "in-the-future"])
def test_what_rotted_is_fetched_again_in_the_same_answer(
    since: float | None, tmp_path: Path
) -> None:
    upstream = cache_of(tmp_path, *ITEMS)
    storage = {"scrub_rate": "0"}
    with narseal_process(tmp_path, upstream, storage=storage) as proxy:
        fill(proxy)
    long_ago(tmp_path, since)
    rotten = tmp_path / "storage" / ITEMS[0].info.url
    rot(rotten)
    with narseal_process(tmp_path, upstream, storage=storage, workers=2) as proxy:
        for item in ITEMS:
            assert fetch(f"{proxy.url}/{item.info.url}") == (200, item.file)
        until(lambda: counted(proxy, 'narseal_storage_errors_total{kind="wrong-content"}') == 1)
        assert "other content than was verified" in proxy.log.read_text()
        until(lambda: rotten.exists() and rotten.read_bytes() == ITEMS[0].file)
        until((tmp_path / "storage" / f"{ITEMS[0].hash}.narinfo").exists)
        assert len(list((tmp_path / "storage/.narseal/quarantine").iterdir())) == 1
        # it was hashed, and so is not hashed again: what rots now is found when its time comes
        rot(tmp_path / "storage" / ITEMS[1].info.url)
        assert fetch(f"{proxy.url}/{ITEMS[1].info.url}") != (200, ITEMS[1].file)


def test_the_scrub_finds_what_nobody_asks_for(tmp_path: Path) -> None:
    upstream = cache_of(tmp_path, *ITEMS)
    with narseal_process(tmp_path, upstream) as proxy:
        fill(proxy)
    rotten, missing = (tmp_path / "storage" / item.info.url for item in ITEMS[:2])
    rot(rotten)
    missing.unlink()
    with narseal_process(tmp_path, upstream, workers=2) as proxy:
        until(lambda: rotten.exists() and rotten.read_bytes() == ITEMS[0].file)
        until(lambda: missing.exists() and missing.read_bytes() == ITEMS[1].file)
        until(lambda: counted(proxy, 'narseal_scrubbed_total{result="good"}') >= 2)
        until(lambda: counted(proxy, 'narseal_scrubbed_total{result="bad"}') == 2)
        until(lambda: counted(proxy, "narseal_scrub_bytes_total") >= 2 * len(ITEMS[2].file))


async def test_a_rotten_upload_is_withdrawn_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    item = entry("uploaded", os.urandom(90_000), compression="zstd")
    lost = metric("narseal_storage_errors_total", kind="lost")
    async with uploading(tmp_path) as uploader:
        client = uploader.client
        assert (await uploader.path(item))[0] == 201
        info = await client.narinfo(item.hash)
        rot(client.storage / info.url)
        long_ago(tmp_path, None)
        assert (await client.get(info.url))[0] == 404
        assert (await client.get(f"{item.hash}.narinfo"))[0] == 404
        assert not (client.storage / f"{item.hash}.narinfo").exists()
        named = [
            record
            for record in caplog.records
            if str(item.info.store_path) in record.msg % record.args
        ]
        assert [record.levelname for record in named] == ["ERROR"]
        assert metric("narseal_storage_errors_total", kind="lost") == lost + 1
        assert (await uploader.path(item))[0] == 201  # brought again, it is served again
        assert (await client.get(info.url))[1] == item.file


@contextmanager
def failing(proxy: Process, file: str, calls: str, when: str = "1+") -> Iterator[None]:
    """A worker for which these system calls on one file that is stored now fail with EIO.

    strace knows files by their paths: the stored one gets another, so that what is fetched in its
    place is another file.
    """
    stored = proxy.folder / "storage" / file
    path = stored
    if "openat" not in calls:
        path = stored.rename(proxy.folder / "bad-sectors")
        stored.symlink_to(path)
    inject = f"inject={calls}:error=EIO:when={when}"
    with strace(proxy, "-P", str(path), "-e", f"trace={calls}", "-e", inject, "-o", "/dev/null"):
        yield


@pytest.mark.parametrize("calls", ["openat", "preadv2,pread64,sendfile"])
@pytest.mark.parametrize("item", [SMALL, ITEMS[0]], ids=["small", "large"])
def test_what_cannot_be_read_is_fetched_again_in_the_same_answer(
    item: Entry, calls: str, tmp_path: Path
) -> None:
    upstream = cache_of(tmp_path, *ITEMS, SMALL)
    storage = {"scrub_rate": "0"}
    with narseal_process(tmp_path, upstream, storage=storage) as proxy:
        fill(proxy, SMALL)
    with narseal_process(tmp_path, upstream, storage=storage) as proxy:  # nothing in memory
        with failing(proxy, item.info.url, calls):
            assert fetch(f"{proxy.url}/{item.info.url}") == (200, item.file)
        assert counted(proxy, 'narseal_storage_errors_total{kind="unreadable"}') >= 1
        assert "Input/output error" in proxy.log.read_text()
        assert counted(proxy, 'narseal_requests_total{code="499",route="nar"}') == 0
        assert fetch(f"{proxy.url}/{item.info.url}") == (200, item.file)


def test_what_cannot_be_read_to_its_end_is_fetched_again_the_next_time(tmp_path: Path) -> None:
    upstream = cache_of(tmp_path, *ITEMS, BIG)
    storage = {"scrub_rate": "0"}
    with narseal_process(tmp_path, upstream, storage=storage) as proxy:
        fill(proxy, BIG)
        with failing(proxy, BIG.info.url, "sendfile", when="3+"):
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                fetch(f"{proxy.url}/{BIG.info.url}")
            until(lambda: "Input/output error" in proxy.log.read_text())
        assert fetch(f"{proxy.url}/{BIG.info.url}") == (200, BIG.file)
        until(lambda: counted(proxy, 'narseal_storage_errors_total{kind="unreadable"}') == 1)
        assert counted(proxy, 'narseal_requests_total{code="499",route="nar"}') == 0


def test_an_only_copy_is_not_condemned_by_one_fault(tmp_path: Path) -> None:
    upstream = cache_of(tmp_path, *ITEMS)
    with narseal_process(tmp_path, upstream, storage={"scrub_rate": "0"}) as proxy:
        fill(proxy)
        with closing(sqlite3.connect(tmp_path / "index.sqlite")) as index:
            index.execute("UPDATE nar SET url = '', upstream = ''")  # as if it had been uploaded
            index.commit()
    with narseal_process(tmp_path, upstream, storage={"scrub_rate": "0"}) as proxy:
        with failing(proxy, ITEMS[0].info.url, "sendfile", when="1"):
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                fetch(f"{proxy.url}/{ITEMS[0].info.url}")
            assert fetch(f"{proxy.url}/{ITEMS[0].info.url}") == (200, ITEMS[0].file)
        until(lambda: counted(proxy, 'narseal_storage_errors_total{kind="unreadable"}') == 1)
        assert not list((tmp_path / "storage/.narseal/quarantine").iterdir())

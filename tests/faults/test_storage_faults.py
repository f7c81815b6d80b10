"""What storage does to a narseal that runs: an index that vanishes, bits that rot, disks that fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.test_process import cache_of, fetch
from tests.tools.cache import entry
from tests.tools.narseal import UPSTREAM, Process, narseal_process
from tests.tools.waiting import until

ITEMS = [entry(f"item{n}", os.urandom(90_000)).signed(UPSTREAM) for n in range(4)]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "narseal", *command], capture_output=True, text=True
    )


def fill(proxy: Process) -> None:
    """All of ITEMS in storage, their narinfos in every worker's memory."""
    for item in ITEMS:
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


@pytest.mark.parametrize("how", ["missing", "empty", "revoked-first"])
def test_no_start_on_a_new_index_beside_a_full_folder(how: str, tmp_path: Path) -> None:
    index = tmp_path / "index.sqlite"
    upstream = cache_of(tmp_path, *ITEMS)
    with narseal_process(tmp_path, upstream) as proxy:
        fill(proxy)
    config = str(tmp_path / "narseal.toml")
    delete_all(index)
    if how == "empty":
        index.touch()
    if how == "revoked-first":
        assert run("revoke", "up-9", "--reason", "x", "--config", config).returncode == 0
    size = index.stat().st_size if index.exists() else None
    refused = run("serve", "--config", config)
    assert refused.returncode == 2
    assert "narseal index rebuild" in refused.stderr and "docs/recovery.md" in refused.stderr
    assert (index.stat().st_size if index.exists() else None) == size
    assert run("index", "rebuild", "--config", config).stdout.startswith(f"put back {len(ITEMS)} ")
    with narseal_process(tmp_path, upstream) as proxy:
        for item in ITEMS:
            assert fetch(f"{proxy.url}/{item.info.url}") == (200, item.file)


def test_a_folder_with_a_nar_that_a_crash_left_is_started_on(tmp_path: Path) -> None:
    """Between the rename of the first NAR and its row: the index is there, and has no path."""
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS)):
        pass
    (tmp_path / "storage" / ITEMS[0].info.url).write_bytes(ITEMS[0].file)
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS)) as proxy:
        fill(proxy)

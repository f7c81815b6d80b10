"""`narseal index check` while the folder, the index or a row of it is not what it should be."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from narseal.cosign.keys import CosignKey
from narseal.errors import Unavailable
from narseal.pipeline.upkeep.check import Subject, problems
from narseal.storage import Epoch, LocalStorage
from tests.faults.test_folder_gone import DAMAGE, change, rows
from tests.faults.test_process import cache_of, fetch
from tests.faults.test_storage_faults import ITEMS, fill
from tests.faults.test_uploads import add
from tests.tools.cache import entry
from tests.tools.command import narseal_command
from tests.tools.narseal import narseal_process

#: In one process, and in several.
SHARES = pytest.mark.parametrize("share", [10_000, 1])


def filled(folder: Path) -> str:
    """An index with ITEMS; its configuration."""
    with narseal_process(folder, cache_of(folder, *ITEMS)) as proxy:
        fill(proxy)
    return str(folder / "narseal.toml")


def miscount(folder: Path) -> None:
    """A check says this first, before it looks at any file."""
    change(folder, "UPDATE total SET nar_bytes = nar_bytes + 1")


def subject(folder: Path) -> Subject:
    url = f"sqlite:///{folder}/index.sqlite"
    storage = LocalStorage(f"file://{folder}/storage", Epoch.of(url).mark)
    return Subject(url, "/nix/store", storage, {}, content=False)


@SHARES
@DAMAGE
def test_a_folder_that_goes_away_during_a_check_says_nothing_of_its_files(
    damage: Callable[[Path], None], share: int, tmp_path: Path
) -> None:
    """Each NAR was in the index and not in storage."""
    filled(tmp_path)
    miscount(tmp_path)
    found = problems(subject(tmp_path), share=share)
    assert "bytes of NARs" in next(found)
    damage(tmp_path / "storage")
    [said] = found
    assert "narseal index join" in said


@SHARES
def test_a_fault_of_the_index_ends_a_check_with_a_sentence(share: int, tmp_path: Path) -> None:
    """In several processes it was a traceback of the driver's."""
    filled(tmp_path)
    miscount(tmp_path)
    found = problems(subject(tmp_path), share=share)
    next(found)
    [(page, size)] = rows(
        tmp_path,
        "SELECT rootpage, page_size FROM sqlite_schema, pragma_page_size WHERE name = 'path'",
    )
    rows(tmp_path, "PRAGMA wal_checkpoint(TRUNCATE)")
    with (tmp_path / "index.sqlite").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    with pytest.raises(Unavailable, match="the index cannot be read"):
        list(found)


@pytest.mark.parametrize("damage", ["signatures = 'operator-1:x'", "extra = '{'"])
def test_a_row_that_cannot_be_read_is_one_of_the_problems(damage: str, tmp_path: Path) -> None:
    """It ended the check, and nothing was said of the rows behind it."""
    config = filled(tmp_path)
    one, two, *_ = sorted(item.hash for item in ITEMS)
    change(tmp_path, f"UPDATE path SET {damage} WHERE hash_part = '{one}'")
    (tmp_path / "storage" / f"{two}.narinfo").unlink()
    checked = narseal_command("index", "check", "--config", config)
    assert (checked.returncode, checked.stdout) == (1, "2 problems\n"), checked.stderr
    assert f"{one}.narinfo: its row in the index cannot be read" in checked.stderr
    assert f"{two}.narinfo is not in storage" in checked.stderr


def test_what_policy_keeps_back_is_no_problem(tmp_path: Path) -> None:
    rule = {
        "match": "*",
        "require": "attestation",
        "cosign_key": CosignKey.generate().public.render(),
    }
    token = add(tmp_path)
    upload = {"enabled": True, "tokens_file": str(tmp_path / "tokens")}
    item = entry("app", compression="zstd")
    with narseal_process(tmp_path, upload=upload, policy=[rule]) as proxy:
        for name, data in (
            (item.info.url, item.file),
            (f"{item.hash}.narinfo", item.info.render()),
        ):
            request = urllib.request.Request(f"{proxy.url}/{name}", data=data, method="PUT")
            request.add_header("Authorization", f"Bearer {token}")
            assert urllib.request.urlopen(request).status == 201
        assert fetch(f"{proxy.url}/{item.hash}.narinfo")[0] == 403
    checked = narseal_command("index", "check", "--config", str(tmp_path / "narseal.toml"))
    assert (checked.returncode, checked.stdout) == (0, "good\n"), checked.stderr


def test_a_rebuild_counts_anew(tmp_path: Path) -> None:
    config = filled(tmp_path)
    miscount(tmp_path)
    change(
        tmp_path,
        "UPDATE total SET waiting = 7; UPDATE served SET rows = 9;"
        " INSERT INTO served (kind, ours, rows) VALUES ('realisation', 'nobody', 3)",
    )
    checked = narseal_command("index", "check", "--config", config)
    assert checked.stdout == "4 problems\n"
    assert checked.stderr.count("run `narseal index rebuild`") == 4
    assert narseal_command("index", "rebuild", "--config", config).returncode == 0
    assert narseal_command("index", "check", "--config", config).stdout == "good\n"

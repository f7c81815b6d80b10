"""The audit log: what was removed, changed, swapped or cut off is found, and where."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from narseal.custody import write_private
from narseal.custody.file import FileKey
from narseal.errors import ConfigError
from narseal.signer import audit
from narseal.signer.audit import AuditLog
from tests.tools.cache import key
from tests.tools.command import narseal_command

AUDIT = key("audit-1")


def opened(folder: Path) -> AuditLog:
    secret = folder / "audit.secret"
    if not secret.exists():
        write_private(secret, AUDIT.render())
    return AuditLog(folder / "log", FileKey.load(f"file:{secret}"))


def record(number: int) -> dict[str, object]:
    return {"kind": "path", "subject": f"/nix/store/x-{number}", "key": "op-1", "uid": 1, "pid": 2}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """50 records with a checkpoint after each ten: 55 lines."""
    made = opened(tmp_path)
    for block in range(5):
        made.append([record(block * 10 + n) for n in range(10)])
        assert made.checkpoint()
    made.close()
    return tmp_path / "log"


def test_a_good_log(log: Path) -> None:
    report = audit.verify(log, AUDIT.public)
    assert (report.lines, report.checkpoints, report.problems) == (55, 5, ())
    assert audit.verify(log, key("other-1").public).problems
    again = opened(log.parent)  # goes on where it ended
    again.append([record(51)])
    again.close()
    assert audit.verify(log, AUDIT.public).problems == ()
    assert [r["n"] for r in audit.records(log)] == list(range(1, 58))


@pytest.mark.parametrize("at", [1, 7, 11, 30, 54])
def test_every_kind_of_tampering_is_found_and_located(log: Path, at: int) -> None:
    lines = log.read_bytes().splitlines(keepends=True)

    def problems(changed: list[bytes]) -> tuple[str, ...]:
        log.write_bytes(b"".join(changed))
        return audit.verify(log, AUDIT.public).problems

    deleted = problems(lines[: at - 1] + lines[at:])
    assert any(f"records {at} to {at} are missing" in p for p in deleted)
    edited = problems(
        [*lines[: at - 1], lines[at - 1].replace(b'"n":', b'"N":0,"n":'), *lines[at:]]
    )
    assert any(f"line {at}: it was changed" in p for p in edited)
    if at > 1:
        swapped = problems([*lines[: at - 2], lines[at - 1], lines[at - 2], *lines[at:]])
        assert any(p.startswith(f"line {at - 1}: records {at - 1} to {at - 1}") for p in swapped)
    cut = problems(lines[:at])
    assert any(f"line {at + 1}: the log ends here, and had 55 lines" in p for p in cut)
    torn = problems([*lines[: at - 1], lines[at - 1][:-20]])
    assert any(f"line {at}: no record" in p for p in torn)
    inserted = problems([*lines[:at], lines[at - 1], *lines[at:]])
    assert any(f"line {at + 1}: record {at} stands where" in p for p in inserted)


def test_the_last_line_changed(log: Path) -> None:
    text = log.read_text()
    log.write_text(text[:-3] + 'X"}\n' if text.endswith('"}\n') else text)
    assert audit.verify(log, AUDIT.public).problems


def test_a_chain_made_anew_without_the_key_is_found(log: Path) -> None:
    """Who rewrites every line after the one he changed has no checkpoints for them."""
    import hashlib

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[24]["subject"] = "/nix/store/evil"
    last = hashlib.sha256(json.dumps(lines[23], separators=(",", ":")).encode()).hexdigest()
    for line in lines[24:]:
        line["prev"] = last
        last = hashlib.sha256(json.dumps(line, separators=(",", ":")).encode()).hexdigest()
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    log.write_text(text)
    found = audit.verify(log, AUDIT.public).problems
    # line 22 is a checkpoint: what comes after it is to be looked at
    assert any("line 33: a checkpoint that the audit key did not sign" in p and "23" in p
               for p in found)  # fmt: skip
    head = log.with_name("log.head")
    head.write_text(json.dumps({"n": 55, "hash": last, "signature": "audit-1:x"}))
    assert "the end: the audit key did not sign the head file" in audit.verify(
        log, AUDIT.public
    ).problems  # fmt: skip


def test_a_log_that_was_cut_off_is_not_gone_on_with(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-2]))
    with pytest.raises(ConfigError, match="ends at line 53, and had 55"):
        opened(log.parent)
    log.write_bytes(b"")
    with pytest.raises(ConfigError, match="is empty, and had 55 lines"):
        opened(log.parent)
    log.write_bytes(b"".join(lines) + b'{"n":56,"half')  # a crash in the middle of a line
    again = opened(log.parent)
    assert again.count == 55
    again.close()
    assert audit.verify(log, AUDIT.public).problems == ()
    with log.open("ab") as file:
        file.write(b"rubbish\n")
    with pytest.raises(ConfigError, match="no record"):
        opened(log.parent)


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_line_is_synced_before_it_counts_and_half_a_line_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """What the machine does is changed here, at its border: calls are seen, or fail half way."""
    made = opened(tmp_path)
    calls: list[str] = []
    write, fsync = os.write, os.fsync

    def seen_write(descriptor: int, data: memoryview) -> int:
        calls.append("write")
        return write(descriptor, data[:50])

    def seen_fsync(descriptor: int) -> None:
        calls.append("fsync")
        fsync(descriptor)

    monkeypatch.setattr(os, "write", seen_write)
    monkeypatch.setattr(os, "fsync", seen_fsync)
    made.append([record(1), record(2)])
    assert calls.count("write") > 2
    assert calls[-1] == "fsync" and calls.count("fsync") == 1
    before = (tmp_path / "log").read_bytes()

    def full(descriptor: int, data: memoryview | None = None) -> int:
        if data is not None and len(calls) % 2:
            calls.append("write")
            return write(descriptor, data[:10])
        raise OSError(28, "no space left")

    calls[:] = ["one"]
    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="no space"):
        made.append([record(3)])
    assert (tmp_path / "log").read_bytes() == before
    assert made.count == 2
    monkeypatch.undo()
    made.append([record(3)])
    made.close()
    assert audit.verify(tmp_path / "log", AUDIT.public).problems == ()


def test_two_signers_do_not_share_a_log(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(ConfigError, match="another signer"):
        opened(tmp_path)
    first.close()


def test_100000_lines_are_verified_in_seconds(tmp_path: Path) -> None:
    made = opened(tmp_path)
    for block in range(100):
        made.append([record(block * 1000 + n) for n in range(1000)])
    made.close()
    start = time.monotonic()
    report = audit.verify(tmp_path / "log", AUDIT.public)
    print(f"{report.lines} lines in {time.monotonic() - start:.1f} s")
    assert (report.lines, report.problems) == (100_001, ())


def test_the_commands(log: Path) -> None:
    done = narseal_command("audit", "verify", log, "--public-key", str(AUDIT.public))
    assert (done.returncode, done.stdout) == (0, "good: 55 lines, 5 checkpoints\n")
    shown = narseal_command("audit", "show", log, "--path", "x-1", "--key", "op-1")
    assert len(shown.stdout.splitlines()) == 11
    as_json = narseal_command(
        "audit", "show", log, "--json", "--since", "2020-01-01T00:00:00Z"
    ).stdout
    assert [json.loads(line)["n"] for line in as_json.splitlines()] == list(range(1, 56))
    lines = log.read_bytes().splitlines(keepends=True)
    last = datetime.fromisoformat(json.loads(lines[-1])["time"])
    for hours, found in ((-1, 55), (1, 0)):  # as times, not as texts
        zone = timezone(timedelta(hours=-9 * hours))
        since = (last + timedelta(hours=hours)).astimezone(zone).isoformat()
        done = narseal_command("audit", "show", log, "--since", since)
        assert len(done.stdout.splitlines()) == found
    done = narseal_command("audit", "show", log, "--since", "yesterday")
    assert done.returncode == 2 and "--since" in done.stderr
    log.write_bytes(b"".join(lines[:4] + lines[5:]))
    done = narseal_command("audit", "verify", log, "--json")
    assert done.returncode == 1
    assert "records 5 to 5 are missing" in json.loads(done.stdout)["problems"][0]
    assert narseal_command("audit", "verify", log, "--public-key", "x").returncode == 2
    assert narseal_command("audit", "verify", log.parent / "absent").returncode == 2

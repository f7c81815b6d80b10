"""The tokens file, edited by hand while narseal serves: what is not sure is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from narseal.custody import tokens
from tests.faults.test_uploads import Uploader, uploading
from tests.tools.command import narseal_command
from tests.tools.narseal import metric
from tests.tools.waiting import eventually


def _rewritten(file: Path, text: str, mode: int = 0o600) -> None:
    """As an editor does it: another file takes the place."""
    new = file.with_name("tokens.new")
    new.write_text(text)
    new.chmod(mode)
    new.replace(file)


async def _status(uploader: Uploader, wanted: int) -> None:
    async def is_so() -> bool:
        return (await uploader.put("nix-cache-info", b""))[0] == wanted

    await eventually(is_so)


@pytest.mark.parametrize(
    ("change", "mode"),
    [
        (lambda _: "", 0o644),
        (lambda text: text + "{}\n", 0o600),
        (lambda text: text.replace('["*"]', '"*"'), 0o600),
    ],
    ids=["others can read it", "a line that is no token", "allow is a text"],
)
async def test_no_token_is_good_while_the_file_is_unusable(
    change: Callable[[str], str], mode: int, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    async with uploading(tmp_path) as uploader:
        good = file.read_text()
        await _status(uploader, 200)
        before = metric("narseal_tokens_file_errors_total")
        _rewritten(file, change(good), mode)
        await _status(uploader, 503)
        for _ in range(20):  # of those, some meet the next look at the file
            status, text = await uploader.put("nix-cache-info", b"")
            assert status == 503, text
            assert "tokens file" in text
            assert str(tmp_path) not in text
        assert metric("narseal_tokens_file_errors_total") > before
        # what is no token of the file at all is no better for it
        assert (await Uploader(uploader.client, "x").put("nix-cache-info", b""))[0] == 401
        _rewritten(file, good)
        await _status(uploader, 200)


async def test_a_mode_that_is_put_right_is_noticed(tmp_path: Path) -> None:
    async with uploading(tmp_path) as uploader:
        (tmp_path / "tokens").chmod(0o644)
        await _status(uploader, 503)
        (tmp_path / "tokens").chmod(0o600)
        await _status(uploader, 200)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("allow", "app-*"),
        ("allow", {"*": 1}),
        ("allow", [1]),
        ("id", 7),
        ("name", None),
        ("expires", True),
        ("expires", "never"),
        ("expires", float("nan")),
        ("expires", 10**400),
        ("hash", "plain"),
        ("alow", ["*"]),
    ],
)
def test_a_line_of_another_shape_is_an_error_that_names_it(
    name: str, value: Any, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    tokens.add(file, "first", allow=("*",), expires=None)
    tokens.add(file, "second", allow=("*",), expires=None)
    first, second = file.read_text().splitlines()
    changed = json.loads(second) | {name: value}
    _rewritten(file, f"{first}\n{json.dumps(changed)}\n")
    found = narseal_command("token", "list", "--tokens-file", file)
    assert found.returncode == 2
    assert f"{file}, line 2: " in found.stderr
    assert name in found.stderr
    assert changed["id"] == 7 or str(changed["hash"])[:40] not in found.stderr


def test_an_id_twice_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    tokens.add(file, "first", allow=("*",), expires=None)
    _rewritten(file, file.read_text() * 2)
    assert narseal_command("token", "list", "--tokens-file", file).returncode == 2


def test_a_pipe_in_its_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokens", 0o600)
    found = narseal_command("token", "list", "--tokens-file", tmp_path / "tokens")
    assert (found.returncode, "no regular file" in found.stderr) == (2, True)

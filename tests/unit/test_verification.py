"""`narseal verify` of store paths, as somebody runs it who trusts a key and nothing else."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from narseal.client.verification import Verification
from narseal.errors import NarsealError
from narseal.nix.hashes import Hash
from tests.tools.cache import Entry, entry, key, store_path, write_cache
from tests.tools.command import narseal_command
from tests.tools.narseal import OPERATOR

ITEM = entry("app", b"1", compression="zstd")
GOOD = ITEM.signed(OPERATOR)
NAMESAKE = key("namesake")


def text(item: Entry) -> bytes:
    return item.info.render()


WRONG: dict[str, tuple[Entry, str]] = {
    "unsigned": (ITEM, "no good signature"),
    "by somebody else": (ITEM.signed(NAMESAKE), "no good signature"),
    "by somebody else of that name": (
        ITEM.but(signatures=(replace(NAMESAKE.sign(ITEM.info.fingerprint()),
                                     key_name=OPERATOR.name),)), "no good signature"),
    "over another path": (GOOD.but(signatures=entry("x").signed(OPERATOR).info.signatures),
                          "no good signature"),
    "NarSize": (GOOD.but(nar_size=ITEM.info.nar_size + 8), "no good signature"),
    "references": (GOOD.but(references=(store_path("a"),)), "no good signature"),
    "FileHash": (GOOD.but(file_hash=Hash.sha256(b"x")), "the file's hash is"),
    "NarHash, signed": (ITEM.but(nar_hash=Hash.sha256(b"x")).signed(OPERATOR), "the NAR has hash"),
    "NarSize, signed": (ITEM.but(nar_size=ITEM.info.nar_size + 8).signed(OPERATOR), "NAR"),
    "another file": (replace(GOOD, file=entry("x", compression="zstd").file), "the NAR has hash"),
}  # fmt: skip


async def outcome(folder: Path, hash_part: str) -> NarsealError | None:
    url = f"file://{folder}"
    async with Verification.opened(
        url, public_keys=[OPERATOR.public], verifier=None, parallel=1
    ) as verification:
        return (await verification.outcome(hash_part)).error


async def test_a_good_path(tmp_path: Path) -> None:
    write_cache(tmp_path, GOOD, entry("more", b"2").signed(NAMESAKE, OPERATOR))
    assert await outcome(tmp_path, ITEM.hash) is None
    assert await outcome(tmp_path, store_path("more").hash_part) is None


@pytest.mark.parametrize("what", WRONG)
async def test_what_is_wrong_is_said(what: str, tmp_path: Path) -> None:
    item, sentence = WRONG[what]
    write_cache(tmp_path, item)
    error = await outcome(tmp_path, item.hash)
    assert error is not None and sentence in str(error)


async def test_a_narinfo_is_of_the_path_that_was_asked_for(tmp_path: Path) -> None:
    write_cache(tmp_path, GOOD)
    other = store_path("other").hash_part
    (tmp_path / f"{other}.narinfo").write_bytes(text(GOOD))
    error = await outcome(tmp_path, other)
    assert error is not None and "is of" in str(error)


def test_the_exit_code_tells_wrong_from_unknown(tmp_path: Path) -> None:
    write_cache(tmp_path, GOOD, WRONG["FileHash"][0].but(store_path=store_path("bad")))
    public = str(OPERATOR.public)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = "http://{}:{}".format(*closed.getsockname())

    def code(url: str, *targets: str) -> int:
        return narseal_command("verify", "--from", url, "--public-key", public, *targets).returncode

    folder = f"file://{tmp_path}"
    good = f"/nix/store/{GOOD.info.store_path}"
    assert code(folder, good) == 0
    assert code(folder, good, f"/nix/store/{store_path('bad')}") == 1
    assert code(folder, good, f"/nix/store/{store_path('absent')}") == 1
    assert code(nobody, good) == 3

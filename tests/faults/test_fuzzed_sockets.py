"""What the fuzzers found at the sockets, and what they start from, against running processes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import seeds, sockets
from tests.fuzz.mutation import mutated
from tests.tools.cache import write_cache
from tests.tools.narseal import narseal_process
from tests.tools.signer import signer

KEPT = Path(__file__).parent.parent / "vectors" / "fuzz"


def inputs(name: str, good: tuple[bytes, ...]) -> Iterator[bytes]:
    """Good ones, all that was ever found, and always the same few that are near good ones."""
    yield from good
    yield from (file.read_bytes() for file in sorted((KEPT / name).glob("*")))
    choice = random.Random(1110)
    yield from (mutated(choice, good) for _ in range(200))


def test_no_bytes_bring_a_worker_down(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", seeds.ITEM)
    upload = {"enabled": True, "tokens_file": f"{tmp_path}/tokens"}
    limits = {"header_timeout": "2s", "shutdown_timeout": "1s"}
    upstream = {"url": f"file://{tmp_path}/cache"}
    with narseal_process(tmp_path / "n", upstream, upload=upload, limits=limits) as process:
        http = sockets.Http(process)
        for data in inputs("http", sockets.HTTP_SEEDS):
            assert http.holds(data), data


@pytest.mark.real
def test_no_bytes_bring_the_signer_down_or_make_it_sign() -> None:
    with signer() as found:
        line = sockets.ToSigner(found)
        for data in inputs("signer-socket", seeds.SIGNER):
            assert line.holds(data), data

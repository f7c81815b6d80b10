"""What the fuzzers start from, and everything that they ever found, against the same rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

KEPT = Path(__file__).parent.parent / "vectors" / "fuzz"


@pytest.mark.parametrize("name", TARGETS)
def test_parser_answers_or_raises_an_error_of_its_own(name: str) -> None:
    target = TARGETS[name]
    found = sorted((KEPT / name).glob("*"))
    for data in (*target.seeds, *(file.read_bytes() for file in found)):
        for cut in {0, 1, len(data) // 2, len(data)}:
            target.run(data[:cut])

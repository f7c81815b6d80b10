"""The list of seeded bugs follows the code: `make mutants` takes an hour, this a second."""

from __future__ import annotations

import re

import pytest

from tests.tools.mutants import PACKAGE, ROOT, Mutant, read

MUTANTS = read()


def test_each_has_a_name_of_its_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_seeded_bug_has_its_place_and_tests_that_exist(mutant: Mutant) -> None:
    assert mutant.seeded((PACKAGE / mutant.file).read_text())
    assert bool(mutant.tests) != bool(mutant.equivalent)
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text()
        assert not name or re.search(rf"^(async )?def {re.escape(name)}\b", text, re.MULTILINE)

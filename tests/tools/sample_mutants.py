"""Draws bugs from what cosmic-ray can seed, with a fixed seed, in the list's own form.

`uv sync --group mutation`, then `python -m tests.tools.sample_mutants COUNT SEED >> tests/mutants.toml`
for the first time; what survives gets a test, or a reason why nothing can be seen of it.
"""

from __future__ import annotations

import ast
import json
import random
import sys
from collections.abc import Iterator
from difflib import SequenceMatcher

from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from tests.tools.mutants import PACKAGE

#: Files of the trust core, and the fast tests that concern them.
NIX = ("tests/unit/test_nix_rules.py", "tests/unit/test_nix_vectors.py",
       "tests/property/test_nix_room.py", "tests/unit/test_evidence.py")  # fmt: skip
FILES: dict[str, tuple[str, ...]] = {
    "nix/keyring.py": NIX,
    "nix/keys.py": NIX,
    "nix/addressing.py": NIX,
    "nix/content_address.py": NIX,
    "nix/fingerprint.py": NIX,
    "nix/inspection.py": NIX,
    "nix/narinfo.py": NIX,
    "nix/realisation.py": NIX,
    "nix/references.py": NIX,
    "nix/store_path.py": NIX,
    "nix/hashes.py": NIX,
    "nix/base32.py": NIX,
    "nix/nar.py": NIX,
    "pipeline/trust/evidence.py": NIX,
    "signer/rules.py": ("tests/unit/test_signing_rules.py",),
    "cosign/verify.py": ("tests/unit/test_cosign.py",),
    "storage/claims.py": ("tests/unit/test_claims.py",),
    "storage/admissions.py": ("tests/unit/test_claims.py", "tests/faults/test_pins.py"),
    "pipeline/uploads/paths.py": ("tests/faults/test_uploads.py", "tests/faults/test_pins.py",
                                  "tests/faults/test_rule.py"),
}  # fmt: skip

#: Bugs that people make. The arithmetic of others is changed in so many ways that it would drown these.
OPERATORS = (
    "AddNot", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue", "ReplaceUnaryOperator_Delete_Not", "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak", "ZeroIterationForLoop", "NumberReplacer",
    "ReplaceComparisonOperator_Gt_GtE", "ReplaceComparisonOperator_GtE_Gt",
    "ReplaceComparisonOperator_Lt_LtE", "ReplaceComparisonOperator_LtE_Lt",
    "ReplaceComparisonOperator_Eq_NotEq", "ReplaceComparisonOperator_NotEq_Eq",
    "ReplaceComparisonOperator_Eq_LtE", "ReplaceComparisonOperator_Eq_GtE",
    "ReplaceComparisonOperator_NotEq_Lt", "ReplaceComparisonOperator_NotEq_Gt",
    "ReplaceComparisonOperator_Is_IsNot", "ReplaceComparisonOperator_IsNot_Is",
)  # fmt: skip


def seeded(text: str) -> Iterator[tuple[str, str]]:
    """Each operator's name and text that it makes of a file's, where that still compiles."""
    wanted = {f"core/{name}" for name in OPERATORS}
    for name in sorted(wanted & set(operator_names())):
        for occurrence in range(10_000):
            changed = mutate_code(text, get_operator(name)(), occurrence)
            if changed is None:
                break
            if changed != text and _compiles(changed):
                yield name, changed


def _compiles(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def difference(text: str, changed: str) -> tuple[str, str]:
    """A piece of whole lines that stands in the text once, and what it becomes."""
    old, new = text.splitlines(keepends=True), changed.splitlines(keepends=True)
    blocks = [b for b in SequenceMatcher(None, old, new).get_opcodes() if b[0] != "equal"]
    first, last, begin, end = blocks[0][1], blocks[-1][2], blocks[0][3], blocks[-1][4]
    while text.count("".join(old[first:last])) != 1 or first == last:
        if first:
            first, begin = first - 1, begin - 1
        if last < len(old):
            last, end = last + 1, end + 1
    return "".join(old[first:last]), "".join(new[begin:end])


def main(count: int, seed: int) -> None:
    """Print `count` mutants."""
    found = [
        (file, name, text, changed)
        for file in FILES
        for text in [(PACKAGE / file).read_text()]
        for name, changed in seeded(text)
    ]
    drawn = random.Random(seed).sample(found, count)
    for number, (file, name, text, changed) in enumerate(drawn, 1):
        old, new = difference(text, changed)
        print(f"\n[[mutant]]\nname = {json.dumps(f'cosmic-ray {seed}-{number}: {name} in {file}')}")
        print(f"file = {json.dumps(file)}\nold = {json.dumps(old)}\nnew = {json.dumps(new)}")
        print(f"tests = {json.dumps(FILES[file])}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))

"""Seeded bugs (tests/mutants.toml): each is put into a copy of the tree, and a test must see it.

`python -m tests.tools.mutants [WORD…]` runs all of them, or those whose name holds a word.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parent.parent.parent
LIST = ROOT / "tests" / "mutants.toml"
PACKAGE = ROOT / "proxy" / "narseal"
_COPIED = ("proxy", "tests", "docs", "examples", "pyproject.toml")
_LONGEST = 900  # seconds; a mutant that hangs its tests is seen, too


@dataclass(frozen=True)
class Mutant:
    """A bug: a piece of a file, what stands there instead, and the tests that must fail."""

    name: str
    #: Below proxy/narseal/.
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    #: Why no test can see it: it changes nothing that can be observed.
    equivalent: str = ""

    def seeded(self, text: str) -> str:
        """The file's text with the bug; ValueError unless its place is there exactly once."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has its place {text.count(self.old)} times")
        return text.replace(self.old, self.new)


def read(file: Path = LIST) -> list[Mutant]:
    """The list."""
    rows = tomllib.loads(file.read_text())["mutant"]
    return [Mutant(**row | {"tests": tuple(row.get("tests", ()))}) for row in rows]


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the tree, for one worker."""
    with tempfile.TemporaryDirectory(prefix="narseal-mutants-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # some tests run a signer as another user
        for part in _COPIED:
            source = ROOT / part
            if source.is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, folder / part, ignore=ignore)
            else:
                shutil.copy(source, folder / part)
        yield folder


def survives(mutant: Mutant, tree: Path) -> bool:
    """Whether the tests pass over the bug."""
    place = tree / "proxy" / "narseal" / mutant.file
    text = place.read_text()
    place.write_text(mutant.seeded(text))
    try:
        return passes(mutant.tests, tree)
    finally:
        place.write_text(text)


def passes(tests: tuple[str, ...], tree: Path) -> bool:
    """Whether tests pass in a tree. ValueError if there is no such test."""
    # the copy comes before the installed package, and no bytecode of the unchanged file is taken
    environment = {"PYTHONPATH": f"{tree}/proxy", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", *tests]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=_LONGEST,
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode in (4, 5):
        raise ValueError(f"{' '.join(tests)}: {done.stdout[-2000:]}")
    return done.returncode == 0


def main(words: list[str]) -> int:
    """Run the list, print a table; 1 if one survives."""
    mutants = [m for m in read() if not words or any(word in m.name for word in words)]
    wanted = [m for m in mutants if not m.equivalent]
    count = min(len(wanted), os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as pool:
        trees: SimpleQueue[Path] = SimpleQueue()
        contexts = [copied() for _ in range(count)]
        for context in contexts:
            trees.put(context.__enter__())
        try:
            named = tuple(sorted({test for m in wanted for test in m.tests}))
            tree = trees.get()
            if not passes(named, tree):
                print("the tests fail without any bug")
                return 2
            trees.put(tree)

            def run(mutant: Mutant) -> bool:
                tree = trees.get()
                try:
                    return survives(mutant, tree)
                finally:
                    trees.put(tree)

            survivors = 0
            for mutant, lives in zip(wanted, pool.map(run, wanted), strict=True):
                survivors += lives
                print(f"{'SURVIVES' if lives else 'killed':9} {mutant.name}", flush=True)
        finally:
            for context in contexts:
                context.__exit__(None, None, None)
    for mutant in mutants:
        if mutant.equivalent:
            print(f"{'no change':9} {mutant.name}: {mutant.equivalent}")
    print(f"{len(wanted) - survivors} of {len(wanted)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

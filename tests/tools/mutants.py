"""Seeded bugs (tests/mutants.toml): each is put into a copy of the tree, and a test must see it.

`python -m tests.tools.mutants [WORD…]` runs all of them, or those whose name holds a word.
"""

from __future__ import annotations

import ast
import os
import shutil
import signal
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
_LONGEST = 900  # seconds; what hangs is told apart: it may be the machine that was too slow


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
        """The file's text with the bug.

        ValueError unless its place is there exactly once, or if it is no Python then: any test sees that.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has its place {text.count(self.old)} times")
        changed = text.replace(self.old, self.new)
        try:
            ast.parse(changed)
        except SyntaxError as error:
            raise ValueError(f"{self.name}: no Python: {error}") from error
        return changed


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


def judged(mutant: Mutant, tree: Path) -> str:
    """What the tests make of the bug: killed, hangs or SURVIVES."""
    place = tree / "proxy" / "narseal" / mutant.file
    text = place.read_text()
    place.write_text(mutant.seeded(text))
    try:
        return "killed" if complaint(mutant.tests, tree) else "SURVIVES"
    except subprocess.TimeoutExpired:
        return "hangs"
    finally:
        place.write_text(text)


def complaint(tests: tuple[str, ...], tree: Path) -> str:
    """The end of what tests say in a tree, if they fail. ValueError if there is no such test.

    TimeoutExpired if they take too long.
    """
    # the copy comes before the installed package, and no bytecode of the unchanged file is taken
    environment = {"PYTHONPATH": f"{tree}/proxy", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", *tests]
    with subprocess.Popen(
        command,
        cwd=tree,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            said, _ = running.communicate(timeout=_LONGEST)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # the servers that it started, too
            raise
    if running.returncode in (4, 5):
        raise ValueError(f"{' '.join(tests)}: {said[-2000:]}")
    return said[-4000:] if running.returncode else ""


def main(words: list[str]) -> int:
    """Run the list, print a table; 1 if one is not killed."""
    mutants = [m for m in read() if not words or any(word in m.name for word in words)]
    for mutant in mutants:
        mutant.seeded((PACKAGE / mutant.file).read_text())  # a reason holds for today's code alone
    wanted = [m for m in mutants if not m.equivalent]
    count = min(len(wanted), os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as pool:
        trees: SimpleQueue[Path] = SimpleQueue()
        contexts = [copied() for _ in range(count)]
        for context in contexts:
            trees.put(context.__enter__())
        try:
            tree = trees.get()
            for named in sorted({test for m in wanted for test in m.tests}):
                if said := complaint((named,), tree):
                    print(f"{said}\n{named} fails without any bug")
                    return 2
            trees.put(tree)

            def run(mutant: Mutant) -> str:
                tree = trees.get()
                try:
                    return judged(mutant, tree)
                finally:
                    trees.put(tree)

            killed = 0
            for mutant, judgement in zip(wanted, pool.map(run, wanted), strict=True):
                killed += judgement == "killed"
                print(f"{judgement:9} {mutant.name}", flush=True)
        finally:
            for context in contexts:
                context.__exit__(None, None, None)
    for mutant in mutants:
        if mutant.equivalent:
            print(f"{'no change':9} {mutant.name}: {mutant.equivalent}")
    print(f"{killed} of {len(wanted)} killed")
    return 0 if killed == len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

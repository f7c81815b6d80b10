"""Real Nix, in a scratch folder that it and the tests both see."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.tools import debian
from tests.tools.waiting import PATIENCE

_CONFIG = """\
experimental-features = nix-command flakes ca-derivations
sandbox = false
build-users-group =
substituters =
connect-timeout = 60
"""


class Nix:
    """One user's Nix with a home and a cache of its own."""

    def __init__(self, folder: Path, root: Path = debian.ROOT) -> None:
        self.folder = folder
        self._root = root
        self.config: dict[str, str] = {}

    def path(self, name: str) -> str:
        """A file of the scratch folder as Nix sees it."""
        return debian.inside(self.folder / name, self._root)

    def run(self, *argv: str, check: bool = True, **environment: str) -> str:
        """Standard output of a command; AssertionError with its errors if it fails."""
        result = self.try_run(*argv, **environment)
        if check:
            assert result.returncode == 0, f"{argv}: {result.stdout}\n{result.stderr}"
        return result.stdout.strip()

    def try_run(self, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command, whatever becomes of it."""
        config = _CONFIG + "".join(f"{name} = {value}\n" for name, value in self.config.items())
        variables = {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": self.path("home"),
            "LANG": "C.UTF-8",
            "NIX_CONFIG": config,
        } | environment
        here = debian.is_here(self._root)
        if here:
            variables["PATH"] = ""  # env keeps this machine's
        pairs = [f"{name}={value}" for name, value in variables.items() if value]
        clean = ["env", *pairs] if here else ["/usr/bin/env", "-i", *pairs]
        return subprocess.run(
            debian.command([*clean, *argv], self._root),
            capture_output=True, text=True, timeout=3 * PATIENCE,  # each derivation waits for the disk
        )  # fmt: skip

    def script(self, text: str) -> str:
        """A shell script, run in the scratch folder, failing at the first error."""
        return self.run("sh", "-c", f"set -e; cd {self.path('.')}; {text}")

    def forget(self) -> None:
        """Forget the client's cache of narinfos, as another machine would not have it."""
        shutil.rmtree(self.folder / "home", ignore_errors=True)

    def version(self) -> str:
        return self.run("nix", "--version").split()[-1]


@contextmanager
def nix(root: Path = debian.ROOT) -> Iterator[Nix]:
    """A Nix with an empty scratch folder, removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="narseal-", dir=debian.scratch(root)))
    folder.chmod(0o755)
    try:
        yield Nix(folder, root)
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)

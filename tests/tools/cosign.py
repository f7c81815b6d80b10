"""Stock cosign, in a scratch folder that it and the tests both see."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.tools import debian
from tests.tools.waiting import PATIENCE

_NO_FILES: Mapping[str, Path] = {}


class Cosign:
    """One user's cosign with a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, file: Path) -> str:
        """A file below the scratch folder as cosign sees it."""
        return debian.inside(file)

    def try_run(
        self, *argv: str | Path, password: str = "", files: Mapping[str, Path] = _NO_FILES
    ) -> subprocess.CompletedProcess[str]:
        """A command, whatever becomes of it; paths are given as this side sees them.

        `files` are variables of its environment that name some.
        """
        (self.folder / "home").mkdir(exist_ok=True)
        words = [self.path(word) if isinstance(word, Path) else word for word in argv]
        environment = [
            f"HOME={self.path(self.folder / 'home')}",
            f"COSIGN_PASSWORD={password}",
            "COSIGN_YES=true",
            *(f"{name}={self.path(file)}" for name, file in files.items()),
            # nobody answers there: a call that wants the network fails at once
            "HTTPS_PROXY=http://127.0.0.1:9",
            "NO_PROXY=localhost,127.0.0.1",
        ]
        if not debian.has_nix_on_path():
            environment = ["-i", "PATH=/usr/bin:/bin", *environment]
        return subprocess.run(
            debian.command(["/usr/bin/env", *environment, "cosign", *words]),
            capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip

    def run(
        self, *argv: str | Path, password: str = "", files: Mapping[str, Path] = _NO_FILES
    ) -> str:
        """A command that must work."""
        result = self.try_run(*argv, password=password, files=files)
        assert result.returncode == 0, f"{argv}: {result.stdout}\n{result.stderr}"
        return result.stdout

"""The real `narseal` command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def narseal_command(
    *argv: str | Path, cwd: Path | None = None, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run it to its end, whatever becomes of it."""
    return subprocess.run(
        [sys.executable, "-m", "narseal", *map(str, argv)],
        capture_output=True, text=True, timeout=120, cwd=cwd, input=stdin,
        env=os.environ | environment,
    )  # fmt: skip

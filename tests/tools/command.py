"""The real `narseal` command."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tests.tools.waiting import PATIENCE


def narseal_command(
    *argv: str | Path, cwd: Path | None = None, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run it to its end, whatever becomes of it; a `serve` that was to be refused and serves is ended."""
    command = [sys.executable, "-m", "narseal", *map(str, argv)]
    env = os.environ | environment
    if argv[0] != "serve":
        return subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, input=stdin, env=env
        )
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=cwd,
            env=env,
        ) as process:
            assert process.stdout is not None
            late = threading.Timer(PATIENCE, process.kill)
            late.start()
            output = process.stdout.readline()  # nothing, or that it serves
            if output:
                process.terminate()
            output += process.stdout.read()
            late.cancel()
        errors.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, output, errors.read())

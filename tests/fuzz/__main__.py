"""`python -m tests.fuzz MINUTES`: all parsers and both sockets, each an equal share of the time.

Exit code 1 if anything broke. Inputs that did are in tests/vectors/fuzz/<target>/.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz import differential, sockets
from tests.fuzz.targets import TARGETS

KEPT = Path(__file__).parent.parent / "vectors" / "fuzz"
_OTHERS = {
    "http": sockets.fuzz_http,
    "signer-socket": sockets.fuzz_signer,
    "nix": differential.fuzz_narinfos,
}


def main(minutes: float) -> int:
    """Run everything; how many findings there are."""
    share = max(1.0, minutes * 60 / (len(TARGETS) + len(_OTHERS)))
    started = time.monotonic()
    findings = sum(_parser(name, share) for name in TARGETS)
    for name, run in _OTHERS.items():
        begun = time.monotonic()
        tried, found = run(share)
        _say(name, tried, begun, len(found))
        for data in found:
            _keep(name, data)
        findings += len(found)
    took = (time.monotonic() - started) / 60
    print(f"{findings} findings in {took:.1f} minutes, {len(TARGETS) + len(_OTHERS)} targets")
    return findings


def _parser(name: str, seconds: float) -> int:
    """Fuzz one parser, going on after each finding."""
    begun = time.monotonic()
    deadline = begun + seconds
    found: set[str] = set()
    runs = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        while (left := round(deadline - time.monotonic())) > 0 or not runs:
            done = subprocess.run(
                [sys.executable, "-m", "tests.fuzz.one", name, str(folder), str(max(1, left))],
                capture_output=True, text=True, errors="replace",
            )  # fmt: skip
            counted = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
            runs += int(counted[1]) if counted else 1
            for file in folder.glob("found-*"):
                _keep(name, file.read_bytes())
                file.unlink()
            if done.returncode:
                tail = "\n".join(done.stderr.splitlines()[-25:])
                last = next((s for s in done.stderr.splitlines() if " | " in s or "Error" in s), "")
                if last not in found:
                    print(f"{name}:\n{tail}", flush=True)
                found.add(last)
    _say(name, runs, begun, len(found))
    return len(found)


def _say(name: str, tried: int, begun: float, findings: int) -> None:
    seconds = time.monotonic() - begun
    print(f"{name}: {tried} inputs in {seconds:.0f} s, {findings} findings", flush=True)


def _keep(name: str, data: bytes) -> None:
    folder = KEPT / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


if __name__ == "__main__":
    sys.exit(bool(main(float(sys.argv[1]))))

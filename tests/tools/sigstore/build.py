"""The real Sigstore services, built from pinned Go modules and kept beside the Debian root."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from tests.tools.debian import CACHE

#: By name: the folder of its go.mod, and the package that its `tool` line names.
SERVICES = {
    "fulcio": "github.com/sigstore/fulcio",
    "rekor": "github.com/sigstore/rekor-tiles/v2/cmd/rekor-server/posix",
    "timestamp": "github.com/sigstore/timestamp-authority/v2/cmd/timestamp-server",
    "tesseract": "github.com/transparency-dev/tesseract/cmd/tesseract/posix",
}
_MODULES = Path(__file__).parent / "go"


def program(name: str) -> Path:
    """Where a service's program is; its name holds the hash of what it was built from."""
    pins = b"".join((_MODULES / name / file).read_bytes() for file in ("go.mod", "go.sum"))
    return CACHE / "sigstore" / f"{name}-{hashlib.sha256(pins).hexdigest()[:16]}"


def install() -> None:
    """Build what is missing, 20 to 50 s each; CalledProcessError if modules are out of reach."""
    for name, package in SERVICES.items():
        target = program(name)
        if target.exists():
            continue
        if not shutil.which("go"):
            raise RuntimeError(
                "Go is missing: the Sigstore services of the tests are built with it"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        # go.sum says what each module must be, so nobody else has to be asked
        environment = os.environ | {"GOFLAGS": "-mod=readonly -buildvcs=false", "CGO_ENABLED": "0"}
        subprocess.run(
            ["go", "build", "-trimpath", "-o", str(part), package],
            cwd=_MODULES / name, env=environment, check=True,
        )  # fmt: skip
        part.rename(target)


if __name__ == "__main__":
    install()

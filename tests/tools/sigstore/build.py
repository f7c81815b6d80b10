"""The real Sigstore services, built from pinned Go modules and kept beside the Debian roots."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.tools import debian

#: By name: the package of the module in `go/<name>`, which pins it.
SERVICES = {
    "fulcio": "github.com/sigstore/fulcio",
    "rekor": "github.com/sigstore/rekor-tiles/v2/cmd/rekor-server/posix",
    "timestamp": ".",
    "tesseract": "github.com/transparency-dev/tesseract/cmd/tesseract/posix",
}
_MODULES = Path(__file__).parent / "go"


def program(name: str) -> Path:
    """Where a service's program is; its name holds the hash of what it was built from."""
    sources = b"".join(file.read_bytes() for file in sorted((_MODULES / name).iterdir()))
    digest = hashlib.sha256(sources).hexdigest()[:16]
    return debian.CACHE / "sigstore" / f"{name}-{digest}"


def install() -> None:
    """Build what is missing, 20 to 50 s each; CalledProcessError if modules are out of reach.

    With this machine's Go, or with that of a Debian root where it has none.
    """
    with debian.locked():
        missing = [name for name in SERVICES if not program(name).exists()]
        root = None if not missing or shutil.which("go") else debian.go_root()
        for name in missing:
            _build(name, root)


def _build(name: str, root: Path | None) -> None:
    target = program(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    # go.sum says what each module must be, so nobody else has to be asked
    environment = os.environ | {"GOFLAGS": "-mod=readonly -buildvcs=false", "CGO_ENABLED": "0"}
    if root:  # the rest of the environment holds there too: proxies above all
        environment |= {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    folder = tempfile.mkdtemp(prefix="build-", dir=debian.scratch(root) if root else target.parent)
    try:
        module = Path(folder) / "module"
        shutil.copytree(_MODULES / name, module)
        there = debian.inside(module, root) if root else str(module)
        build = ["go", "build", "-C", there, "-trimpath", "-o", "../program", SERVICES[name]]
        argv = debian.command(build, root) if root else build
        subprocess.run(argv, env=environment, check=True)
        shutil.move(Path(folder) / "program", target)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    install()

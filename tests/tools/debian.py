"""Debian packages and a Debian sid root with real Nix and cosign, made once and kept.

Nothing relies on what a machine happens to have: `python -m tests.tools.debian` installs it.
The root is kept in ~/.cache/narseal-tests; a machine with nix and cosign on PATH uses those.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CACHE = Path(os.environ.get("TESTS_CACHE", Path.home() / ".cache" / "narseal-tests"))
ROOT = CACHE / "sid"
#: Commands that tests use, and the packages that bring them.
PACKAGES = {
    "debootstrap": "debootstrap",
    "nginx": "nginx-light",
    "wrk": "wrk",
    "curl": "curl",
    "strace": "strace",
    "openssl": "openssl",
    "promtool": "prometheus",
}
_IN_ROOT = ("nix-bin", "cosign", "ca-certificates", "curl")
# procfs and a pty are wanted by nix-build; the mounts vanish with the namespace
_ENTER = 'mount --bind /proc "$0/proc" && mount --rbind /dev "$0/dev" && exec chroot "$0" "$@"'


def install() -> None:
    """Bring everything that is missing; CalledProcessError if Debian's packages are out of reach."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [package for command, package in PACKAGES.items() if not shutil.which(command)]
        if missing:
            _install(missing)
        if not has_nix_on_path() and not ROOT.exists():
            _make_root()
        if not has_nix_on_path():  # else cosign asks a name server for localhost
            (ROOT / "etc" / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")


def _install(packages: list[str]) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    policy = Path("/usr/sbin/policy-rc.d")
    forbid = not policy.exists()
    if forbid:  # an installed server must not start itself
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        subprocess.run(["apt-get", "update", "-q"], check=True, env=environment)
        subprocess.run(
            ["apt-get", "install", "-qy", "--no-install-recommends", *packages],
            check=True, env=environment,
        )  # fmt: skip
    finally:
        if forbid:
            policy.unlink()


def has_nix_on_path() -> bool:
    """Whether this machine brings nix and cosign itself."""
    return bool(shutil.which("nix") and shutil.which("cosign"))


def command(argv: Sequence[str]) -> list[str]:
    """How to run a program of the root (or of this machine) as it stands there."""
    if has_nix_on_path():
        return list(argv)
    if not ROOT.exists():
        raise RuntimeError("the Debian root is missing: run `python -m tests.tools.debian`")
    return ["unshare", "-m", "sh", "-c", _ENTER, str(ROOT), *argv]


def inside(path: Path) -> str:
    """A path of this machine as a program of the root sees it; it must be below `scratch`."""
    return str(path) if has_nix_on_path() else "/" + str(path.relative_to(ROOT))


def scratch() -> Path:
    """A folder that both sides see."""
    folder = CACHE / "scratch" if has_nix_on_path() else ROOT / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _make_root() -> None:
    part = CACHE / "sid.part"
    shutil.rmtree(part, ignore_errors=True)
    sites = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    mirror = next(site for site in sites if site.rstrip("/").endswith("/debian"))
    result = subprocess.run(
        [
            "debootstrap",
            "--variant=minbase",
            f"--include={','.join(_IN_ROOT)}",
            "sid",
            str(part),
            mirror,
        ],
    )
    # it ends with a warning about a base package; what counts is whether the programs run
    check = [
        "unshare",
        "-m",
        "sh",
        "-c",
        _ENTER,
        str(part),
        "sh",
        "-c",
        "nix --version && cosign version >/dev/null",
    ]
    if subprocess.run(check).returncode:
        raise RuntimeError(f"debootstrap ended with {result.returncode}: {shlex.join(check)} fails")
    part.rename(ROOT)


if __name__ == "__main__":
    install()
    sys.exit(0)

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CACHE = Path(os.environ.get("TESTS_CACHE", Path.home() / ".cache" / "narseal-tests"))
ROOT = CACHE / "sid"
#: With the Nix of Debian bookworm, 2.8: the oldest client that tests drive.
OLD_ROOT = CACHE / "bookworm"
#: With Go, made only where this machine has none and something must be built with it.
_GO_ROOT = CACHE / "sid-go"
#: Commands that tests use, and the packages that bring them.
PACKAGES = {
    "debootstrap": "debootstrap",
    "nginx": "nginx-light",
    "wrk": "wrk",
    "curl": "curl",
    "strace": "strace",
    "openssl": "openssl",
    "promtool": "prometheus",
    "softhsm2-util": "softhsm2",
    "pkcs11-tool": "opensc",
}
_IN_ROOT = ("nix-bin", "cosign", "ca-certificates", "curl")
# procfs and a pty are wanted by nix-build; the mounts vanish with the namespace
_ENTER = 'mount --bind /proc "$0/proc" && mount --rbind /dev "$0/dev" && exec chroot "$0" "$@"'


def install() -> None:
    """Bring everything that is missing; CalledProcessError if Debian's packages are out of reach."""
    with locked():
        missing = [package for command, package in PACKAGES.items() if not shutil.which(command)]
        if missing:
            _install(missing)
        if not has_nix_on_path() and not ROOT.exists():
            _make_root(ROOT, "nix --version && cosign version >/dev/null", _IN_ROOT)
        if not OLD_ROOT.exists():
            _make_root(OLD_ROOT, "nix --version", ("nix-bin", "ca-certificates"))
        for root in (ROOT, OLD_ROOT):
            if root.exists():  # else cosign asks a name server for localhost
                (root / "etc" / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")


@contextmanager
def locked() -> Iterator[None]:
    """Alone in the cache: who makes something there waits for who makes it already."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def go_root() -> Path:
    """A Debian root that has Go, made if it is missing; to be called while `locked`.

    Go in it speaks to the proxies that this machine's Go would: by variables of the environment,
    `go env -w` and the certificates that this machine trusts.
    """
    if not shutil.which("debootstrap"):
        _install([PACKAGES["debootstrap"]])
    if not _GO_ROOT.exists():
        _make_root(_GO_ROOT, "go version", ("golang-go", "ca-certificates"))
    certificates = Path("/etc/ssl/certs/ca-certificates.crt")
    settings = Path.home() / ".config" / "go" / "env"
    for file, there in (
        (certificates, certificates),
        (settings, Path("/root/.config/go/env")),
        (Path("/etc/resolv.conf"), Path("/etc/resolv.conf")),
    ):
        if file.exists():
            target = _GO_ROOT / there.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return _GO_ROOT


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


def is_here(root: Path) -> bool:
    """Whether a root's programs are taken from this machine itself."""
    return root == ROOT and has_nix_on_path()


def command(argv: Sequence[str], root: Path = ROOT) -> list[str]:
    """How to run a program of a root (or of this machine) as it stands there."""
    if is_here(root):
        return list(argv)
    if not root.exists():
        raise RuntimeError("the Debian root is missing: run `python -m tests.tools.debian`")
    return ["unshare", "-m", "sh", "-c", _ENTER, str(root), *argv]


def inside(path: Path, root: Path = ROOT) -> str:
    """A path of this machine as a program of the root sees it; it must be below `scratch`."""
    return str(path) if is_here(root) else "/" + str(path.relative_to(root))


def scratch(root: Path = ROOT) -> Path:
    """A folder that both sides see."""
    folder = CACHE / "scratch" if is_here(root) else root / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _make_root(root: Path, programs: str, packages: Sequence[str]) -> None:
    """A root with these packages, named after Debian's suite (and what it is for, after a dash)."""
    part = root.with_suffix(".part")
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
            f"--include={','.join(packages)}",
            root.name.partition("-")[0],
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
        programs,
    ]
    if subprocess.run(check).returncode:
        raise RuntimeError(f"debootstrap ended with {result.returncode}: {shlex.join(check)} fails")
    part.rename(root)


if __name__ == "__main__":
    install()
    sys.exit(0)

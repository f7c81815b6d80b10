"""A real `narseal signer` as another Unix user, and keys in a SoftHSM token."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from narseal.cosign.keys import CosignKey
from narseal.custody import write_private
from tests.tools.cache import key
from tests.tools.narseal import OPERATOR, UPSTREAM, render_toml
from tests.tools.waiting import PATIENCE, until

AUDIT = key("audit-1")
#: Debian has it on every machine; nothing of ours runs as it.
USER = pwd.getpwnam("nobody")
MODULE = "/usr/lib/softhsm/libsofthsm2.so"


class Signer:
    """The process and its files, in a folder that belongs to its user."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "run" / "signer.sock"
        self.log = folder / "audit.log"
        self.errors = folder / "signer.jsonl"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"agent:{self.socket}"

    def start(self, *, file_size: int | None = None) -> None:
        """As the other user, if this is root; with `file_size`, no file grows beyond it."""
        limited = ["prlimit", f"--fsize={file_size}"] if file_size else []
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [*as_user(), *limited, sys.executable, "-m", "narseal", "signer", "--config",
                 f"{self.folder}/signer.toml"],
                stderr=errors, cwd="/",
            )  # fmt: skip

    def wait(self) -> None:
        """Until it takes connections."""

        def answers() -> bool:
            with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
                sock.connect(str(self.socket))
                return True
            assert self.process and self.process.poll() is None, self.errors.read_text()
            return False

        until(answers)

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(PATIENCE)

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def signer(
    *, checkpoint: str = "1h", keys_beside: Sequence[dict[str, Any]] = (), **more: Any
) -> Iterator[Signer]:
    """A signer with the operator's key and a cosign key, which trusts the upstream's key.

    It answers this process's user.
    """
    folder = Path(tempfile.mkdtemp(prefix="signer-"))
    found = Signer(folder)
    (folder / "run").mkdir()
    write_private(folder / "operator.secret", OPERATOR.render())
    write_private(folder / "cosign.key", CosignKey.generate().render(b""))
    write_private(folder / "audit.secret", AUDIT.render())
    tree = {
        "listen": f"unix:{found.socket}",
        "allow_users": [str(os.geteuid())],
        "trusted_keys": [str(UPSTREAM.public)],
        "key": [{"url": f"file:{folder}/operator.secret"}, *keys_beside],
        "cosign_key": [{"url": f"file:{folder}/cosign.key", "name": "release"}],
        "audit": {"log": str(found.log), "key": f"file:{folder}/audit.secret",
                  "checkpoint": checkpoint},
    } | more  # fmt: skip
    (folder / "signer.toml").write_text(render_toml(tree))
    folder.chmod(0o755)
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, USER.pw_uid, USER.pw_gid)
    found.start()
    try:
        found.wait()
        yield found
    finally:
        if found.process and found.process.poll() is None:
            found.thaw()
            found.kill(signal.SIGTERM)
        shutil.rmtree(folder, ignore_errors=True)


class SoftHsm:
    """A token with an Ed25519 and a P-256 key, made by OpenSC's own tool."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pin = secrets.token_hex(4)
        self.pin_file = folder / "pin"
        self.environment = {"SOFTHSM2_CONF": str(folder / "softhsm2.conf")}
        (folder / "tokens").mkdir()
        (folder / "softhsm2.conf").write_text(
            f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n"
        )
        write_private(self.pin_file, self.pin)
        self._run(
            "softhsm2-util", "--init-token", "--free", "--label", "narseal", "--pin", self.pin,
            "--so-pin", secrets.token_hex(4),
        )  # fmt: skip
        for label, kind, number in (
            ("hsm-1", "EC:edwards25519", "01"),
            ("release", "EC:prime256v1", "02"),
        ):
            self.make(label, kind, number)

    def make(self, label: str, kind: str, number: str) -> None:
        """A new pair of keys, with the id `number`."""
        self.tool("--keypairgen", "--key-type", kind, "--label", label, "--id", number)

    def tool(self, *argv: str) -> None:
        """OpenSC's tool, logged in."""
        self._run(
            "pkcs11-tool", "--module", MODULE, "--token-label", "narseal", "--login", "--pin",
            self.pin, *argv,
        )  # fmt: skip

    def serial(self) -> str:
        """The token's."""
        lines = self._run("softhsm2-util", "--show-slots").splitlines()
        (found,) = {
            value.strip()
            for name, _, value in (line.partition(":") for line in lines)
            if name.strip() == "Serial number" and value.strip()
        }
        return found

    def bring(self, label: str, seed: bytes) -> None:
        """Put a known Ed25519 key into the token, so that one can look for it elsewhere."""
        private = Ed25519PrivateKey.from_private_bytes(seed)
        file = self.folder / f"{label}.pem"
        form = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_private(file, private.private_bytes(*form).decode())
        self._run(
            "softhsm2-util", "--import", str(file), "--token", "narseal", "--label", label,
            "--id", "0a", "--pin", self.pin,
        )  # fmt: skip
        file.unlink()

    def url(self, label: str) -> str:
        """Of one of its keys."""
        return (
            f"pkcs11:token=narseal;object={label}?module-path={MODULE}"
            f"&pin-source=file:{self.pin_file}"
        )

    def hide_keys(self) -> dict[Path, bytes]:
        """Take the keys' files away, but not the token; `show_keys` brings them back."""
        kept = {
            path: path.read_bytes()
            for path in self.folder.glob("tokens/*/*.object")
            if path.name != "token.object"
        }
        for path in kept:
            path.unlink()
        return kept

    def show_keys(self, kept: dict[Path, bytes]) -> None:
        for path, data in kept.items():
            path.write_bytes(data)

    def _run(self, *argv: str) -> str:
        done = subprocess.run(
            argv,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def as_user(uid: int = USER.pw_uid) -> list[str]:
    """As the other user, who may read this project wherever it is, and nothing else of root's."""
    if os.geteuid() != 0:
        return []
    return [
        "setpriv", "--reuid", str(uid), "--regid", str(USER.pw_gid), "--clear-groups",
        "--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search",
    ]  # fmt: skip

"""Keys in files of the operator's: mode 0600, or a systemd credential."""

from __future__ import annotations

import os
import stat
from datetime import datetime
from pathlib import Path

from narseal.errors import ConfigError, MalformedKey
from narseal.nix.keys import PublicKey, SecretKey, Signature

_MAX_BYTES = 4096
_CREDENTIALS = "CREDENTIALS_DIRECTORY"


class FileKey:
    """One substituter key, read once from `file:PATH`.

    `sign` is a coroutine because other custodies answer over a socket or from a token.
    """

    def __init__(self, secret: SecretKey, *, not_after: datetime | None = None) -> None:
        self._secret = secret
        self.public: PublicKey = secret.public
        self.not_after = not_after

    @classmethod
    def load(cls, url: str, *, not_after: datetime | None = None) -> FileKey:
        """The key at `file:PATH`; `$CREDENTIALS_DIRECTORY` at its start is systemd's.

        ConfigError if the file is missing, readable by others, or no secret key.
        """
        if not_after and not_after.tzinfo is None:
            raise ConfigError(
                f"{url}: not_after needs a time zone, for example 2028-01-01T00:00:00Z"
            )
        text = read_private(Path(expand(url.removeprefix("file:"))))
        try:
            return cls(SecretKey.parse(text), not_after=not_after)
        except MalformedKey as error:
            raise ConfigError(
                f"{url}: {error}; make one with `narseal key generate NAME`"
            ) from error

    async def sign(self, message: bytes) -> Signature:
        """The Ed25519 signature over a fingerprint that narseal verified."""
        return self._secret.sign(message)


def expand(path: str) -> str:
    """Put systemd's credentials directory in the place of its variable."""
    directory = os.environ.get(_CREDENTIALS)
    variable = f"${_CREDENTIALS}/"
    if not path.startswith(variable):
        return path
    if not directory:
        raise ConfigError(f"{path}: {_CREDENTIALS} is not set; is LoadCredential= in the unit?")
    return os.path.join(directory, path.removeprefix(variable))


def read_private(path: Path) -> str:
    """The text of a small file that nobody but its owner may read; ConfigError else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path}: not a regular file")
    with open(descriptor, "rb") as file:
        # systemd shows the mask of its access list as group bits of a credential
        directory = os.environ.get(_CREDENTIALS)
        credential = directory is not None and path.parent == Path(directory)
        if status.st_mode & (0o007 if credential else 0o077):
            mode = stat.S_IMODE(status.st_mode)
            raise ConfigError(f"{path}: mode {mode:04o} lets others read it; chmod 600 {path}")
        data = file.read(_MAX_BYTES + 1)
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError("too long for a key")
        return data.decode("ascii")
    except ValueError as error:
        raise ConfigError(f"{path}: not a key file: {error}") from error


def write_private(path: Path, text: str) -> None:
    """Create a file of mode 0600 with the text, durably; ConfigError if it exists."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be made: {error.strerror}") from error
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)

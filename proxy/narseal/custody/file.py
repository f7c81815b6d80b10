"""Keys in files of the operator's: mode 0600, or a systemd credential."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from nacl._sodium import ffi, lib

from narseal.custody.memory import Locked, decode_base64, read_into
from narseal.custody.requests import Request
from narseal.errors import ConfigError, MalformedKey, cannot_make
from narseal.nix.keys import PublicKey, Signature, check_key_name
from narseal.runtime.threads import by_size

_MAX_BYTES = 4096
_CREDENTIALS = "CREDENTIALS_DIRECTORY"


class FileKey:
    """One substituter key, read once from `file:PATH` into locked memory."""

    def __init__(self, name: str, secret: Locked) -> None:
        """`secret` is libsodium's secret key: the seed, then the public half."""
        self._secret = secret
        self.public = PublicKey(name, bytes(secret.view[32:64]))

    @classmethod
    def load(cls, url: str) -> FileKey:
        """The key at `file:PATH`; `$CREDENTIALS_DIRECTORY` at its start is systemd's.

        ConfigError if the file is missing, readable by others, or no secret key.
        """
        descriptor = open_private(Path(expand(url.removeprefix("file:"))))
        text = Locked(_MAX_BYTES + 1)
        try:
            size = read_into(descriptor, text.view)
            return cls(*_parse(text.view[:size]))
        except MalformedKey as error:
            raise ConfigError(
                f"{url}: {error}; make one with `narseal key generate NAME`"
            ) from error
        finally:
            os.close(descriptor)
            text.close()

    async def sign(self, request: Request) -> Signature:
        """The Ed25519 signature over what narseal verified."""
        message = request.message
        return await by_size(len(message), self.sign_message, message)

    async def note(self, kind: str, name: str, reason: str) -> None:
        """There is no audit log: the index says what is revoked."""

    def sign_message(self, message: bytes) -> Signature:
        """The Ed25519 signature over a message of narseal's own making."""
        signed = ffi.new("unsigned char[]", len(message) + 64)
        lib.crypto_sign(signed, ffi.NULL, message, len(message), self._secret.pointer)
        return Signature(self.public.name, ffi.buffer(signed, 64)[:])

    def close(self) -> None:
        """Clear the secret half."""
        self._secret.close()


def _parse(text: memoryview) -> tuple[str, Locked]:
    """`name:base64` of 64 bytes. The secret is never in memory that is not locked."""
    end = len(text)
    while end and text[end - 1] in b" \t\r\n":
        end -= 1
    colon = next((at for at in range(end) if text[at] == ord(":")), None)
    if colon is None or len(text) > _MAX_BYTES:
        raise MalformedKey("secret key without a colon")
    name = check_key_name(bytes(text[:colon]).decode("ascii", "replace"))
    secret = Locked(64)
    if not decode_base64(text[colon + 1 : end], secret.view):
        raise MalformedKey(f"secret key of {name!r}: not 64 bytes in base-64")
    made, public = Locked(64), ffi.new("unsigned char[]", 32)
    lib.crypto_sign_seed_keypair(public, made.pointer, secret.pointer)
    if ffi.buffer(public)[:] != bytes(secret.view[32:]):
        raise MalformedKey(f"secret key {name!r}: its two halves do not belong together")
    return name, secret


def expand(path: str) -> str:
    """Put systemd's credentials directory in the place of its variable."""
    directory = os.environ.get(_CREDENTIALS)
    variable = f"${_CREDENTIALS}/"
    if not path.startswith(variable):
        return path
    if not directory:
        raise ConfigError(f"{path}: {_CREDENTIALS} is not set; is LoadCredential= in the unit?")
    return os.path.join(directory, path.removeprefix(variable))


def open_private(path: Path) -> int:
    """A descriptor of a file that nobody but its owner may read; ConfigError else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    status = os.fstat(descriptor)
    # systemd shows the mask of its access list as group bits of a credential
    directory = os.environ.get(_CREDENTIALS)
    credential = directory is not None and path.parent == Path(directory)
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISREG(status.st_mode) and not mode & (0o007 if credential else 0o077):
        return descriptor
    os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: not a regular file")
    raise ConfigError(f"{path}: mode {mode:04o} lets others read it; chmod 600 {path}")


def read_private(path: Path) -> str:
    """The text of such a small file; ConfigError if it is not one."""
    with open(open_private(path), "rb") as file:
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
    except FileExistsError as error:
        raise ConfigError(f"{path} is there already, and stays: name another file") from error
    except OSError as error:
        raise cannot_make(path, error) from error
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)

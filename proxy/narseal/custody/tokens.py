"""Upload tokens: a file of argon2 hashes, one JSON line each; the token itself is shown once."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from nacl.exceptions import InvalidkeyError
from nacl.pwhash import argon2id

from narseal.errors import ConfigError, Unavailable

_log = logging.getLogger(__name__)

_TOKEN = re.compile(r"narseal_([0-9a-f]{12})_([A-Za-z0-9_-]{43})", re.ASCII)
_MAX_BYTES = 4 << 20
# a token has 256 random bits: the hash is there for those who read the file, not against guessing
_OPS, _MEMORY = argon2id.OPSLIMIT_MIN, argon2id.MEMLIMIT_MIN


@dataclass(frozen=True, slots=True)
class Token:
    """What the file holds of a token."""

    id: str
    name: str
    #: Globs on store path names, such as `*-app-*`.
    allow: tuple[str, ...]
    #: Unix time; None: never.
    expires: float | None
    hash: str

    @property
    def covers_all(self) -> bool:
        """Whether there is no store path that it does not cover."""
        return "*" in self.allow

    def may(self, path_name: str) -> bool:
        """Whether it covers a store path of this name."""
        return any(fnmatchcase(path_name, glob) for glob in self.allow)


class Tokens:
    """The tokens of a file, read anew when it changed."""

    def __init__(self, file: Path) -> None:
        """ConfigError if the file is there and cannot be used."""
        self._file = file
        self._seen: tuple[int, int] | None = None
        self._by_id: dict[str, Token] = {}
        #: Why the file cannot be used; then no token is good.
        self._error: ConfigError | None = None
        #: In the place of an unknown id's hash, so that both take the same time.
        self._nobody = argon2id.str(secrets.token_bytes(32), _OPS, _MEMORY).decode()
        self.refresh()
        if self._error:
            raise self._error

    def refresh(self) -> bool:
        """Read the file if it is another than before; whether it was. Blocks.

        From a file that cannot be used no token is good until it can be.
        """
        try:
            status = self._file.stat()
            mark = (status.st_mtime_ns, status.st_ino)
        except FileNotFoundError:
            changed = bool(self._by_id or self._error)
            self._seen, self._by_id, self._error = None, {}, None
            return changed
        if mark == self._seen:
            return False
        try:
            found, error = _read(self._file), None
        except ConfigError as caught:
            found, error = [], caught
            if str(caught) != str(self._error):
                _log.error("no upload is taken: %s", caught)
        self._by_id, self._error = {token.id: token for token in found}, error
        self._seen = None if error else mark  # a chmod that mends it changes no time of writing
        return True

    def check(self, text: str, *, now: float) -> Token | None:
        """The token, if it is in the file and has not expired. Blocks for milliseconds.

        Unavailable if the file cannot be used: then nobody knows which tokens were revoked.
        """
        if self._error:
            raise Unavailable("the file of upload tokens cannot be used; narseal's log says why")
        match = _TOKEN.fullmatch(text)
        found = self._by_id.get(match[1]) if match else None
        try:
            argon2id.verify((found.hash if found else self._nobody).encode(), text.encode())
        except (InvalidkeyError, ValueError):
            return None
        return found if found and (found.expires is None or now < found.expires) else None


def add(file: Path, name: str, *, allow: tuple[str, ...], expires: float | None) -> tuple[str, str]:
    """Make a token; returns its id and the token, which is nowhere else."""
    id_ = secrets.token_hex(6)
    text = f"narseal_{id_}_{secrets.token_urlsafe(32)}"
    hashed = argon2id.str(text.encode(), _OPS, _MEMORY).decode().rstrip("\0")
    with _changing(file) as tokens:
        tokens.append(Token(id_, name, allow, expires, hashed))
    return id_, text


def revoke(file: Path, id_or_name: str) -> list[Token]:
    """Take tokens out by id or name; ConfigError if there is none such."""
    with _changing(file) as tokens:
        gone = [token for token in tokens if id_or_name in (token.id, token.name)]
        if not gone:
            raise ConfigError(f"{file}: no token has the id or name {id_or_name!r}")
        tokens[:] = [token for token in tokens if token not in gone]
    return gone


def listed(file: Path) -> list[Token]:
    """Every token of the file; none if it is not there."""
    return _read(file) if file.exists() else []


@contextmanager
def _changing(file: Path) -> Iterator[list[Token]]:
    """The file's tokens; what becomes of the list is written, all or nothing."""
    try:
        with open(f"{file}.lock", "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tokens = listed(file)
            yield tokens
            part = file.with_name(f"{file.name}.part")
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "w", encoding="utf-8") as opened:
                opened.writelines(json.dumps(asdict(token)) + "\n" for token in tokens)
                opened.flush()
                os.fsync(opened.fileno())
            part.replace(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror}") from error


def _read(file: Path) -> list[Token]:
    try:
        with file.open(encoding="utf-8") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            text = opened.read(_MAX_BYTES)
        if mode & 0o077:
            raise ConfigError(f"{file}: others can read it; chmod 600 {file}")
        return [_parse(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not a file of `narseal token add`: {error}") from error


def _parse(line: str) -> Token:
    tree = json.loads(line)
    texts = [tree[name] for name in ("id", "name", "hash")]
    allow, expires = tree["allow"], tree["expires"]
    if not isinstance(allow, list) or not all(isinstance(item, str) for item in [*texts, *allow]):
        raise TypeError("id, name and hash are texts, and allow is a list of texts")
    if isinstance(expires, bool) or not isinstance(expires, int | float | None):
        raise TypeError("expires is a number of seconds since 1970, or null")
    id_, name, hash_ = texts
    return Token(id_, name, tuple(allow), None if expires is None else float(expires), hash_)

"""Upload tokens: a file of argon2 hashes, one JSON line each; the token itself is shown once."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from nacl.exceptions import InvalidkeyError
from nacl.pwhash import argon2id

from narseal.errors import ConfigError, TokensUnusable, cannot_make
from narseal.nix.name_globs import matches

_TOKEN = re.compile(r"narseal_([0-9a-f]{12})_([A-Za-z0-9_-]{43})", re.ASCII)
_ID = re.compile(r"[0-9a-f]{12}", re.ASCII)
_HASH = "$argon2id$"
_MAX_BYTES = 4 << 20
_MOST_SECONDS = 1 << 40  # some 35,000 years; what is less is finite, and a float
# a token has 256 random bits: the hash is there for those who read the file, not against guessing
_OPS, _MEMORY = argon2id.OPSLIMIT_MIN, argon2id.MEMLIMIT_MIN


@dataclass(frozen=True, slots=True)
class Token:
    """What the file holds of a token."""

    id: str
    name: str
    #: Globs on store path names, such as `app-*`.
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
        return matches(path_name, self.allow)


class Tokens:
    """The tokens of a file, read anew when it changed.

    While the file cannot be used, none of them is good: who was taken out of it is not known.
    """

    def __init__(self, file: Path) -> None:
        """Reads the file, as `refresh` does."""
        self._file = file
        self._seen: tuple[int, ...] | None = None
        self._by_id: dict[str, Token] = {}
        #: Why the file cannot be used; None: it can.
        self.fault: ConfigError | None = None
        #: In the place of an unknown id's hash, so that both take the same time.
        self._nobody = argon2id.str(secrets.token_bytes(32), _OPS, _MEMORY).decode()
        #: How often anything changed by a look at the file.
        self.version = 0
        self._reading = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Read the file if it is another than before; `version` is another then. Blocks, in any thread."""
        with self._reading:
            before, fault = self._by_id, str(self.fault)
            try:
                mark = _mark(self._file)
                if mark is None or mark != self._seen:
                    self._by_id = {token.id: token for token in listed(self._file)}
                self._seen, self.fault = mark, None
            except ConfigError as error:  # it is read again at the next look
                self._seen, self._by_id, self.fault = None, {}, error
            self.version += before != self._by_id or fault != str(self.fault)

    def check(self, text: str, *, now: float) -> Token | None:
        """The token, if it is in the file and has not expired. Blocks for milliseconds.

        TokensUnusable if the file cannot be used.
        """
        match = _TOKEN.fullmatch(text)
        if match and self.fault:
            raise TokensUnusable("the tokens file cannot be used; narseal's log says why")
        found = self._by_id.get(match[1]) if match else None
        try:
            argon2id.verify((found.hash if found else self._nobody).encode(), text.encode())
        except (InvalidkeyError, ValueError):
            return None
        return found if found and (found.expires is None or now < found.expires) else None


def add(file: Path, name: str, *, allow: tuple[str, ...], expires: float | None) -> tuple[str, str]:
    """Make a token; returns its id and the token, which is nowhere else.

    ConfigError if another is called so: `revoke` by a name takes out one.
    """
    id_ = secrets.token_hex(6)
    text = f"narseal_{id_}_{secrets.token_urlsafe(32)}"
    hashed = argon2id.str(text.encode(), _OPS, _MEMORY).decode().rstrip("\0")
    with _changing(file) as tokens:
        if any(token.name == name for token in tokens):
            raise ConfigError(
                f"{file}: there is a token called {name}; take another name, or take that one out"
                f" with `narseal token revoke {name}`"
            )
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
    return _read(file)


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
        raise cannot_make(file, error) from error


def _mark(file: Path) -> tuple[int, ...] | None:
    """What changes whenever the file does, its mode included; None if it is not there."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size


def _read(file: Path) -> list[Token]:
    try:
        # a pipe would be waited for
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, encoding="utf-8") as opened:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise ValueError("it is no regular file")
            text = opened.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not a file of `narseal token add`: {error}") from error
    if mode & 0o077:
        raise ConfigError(f"{file}: others can read it; chmod 600 {file}")
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{file}: more than {_MAX_BYTES} characters of tokens")
    found: dict[str, Token] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                token = _parse(line)
                if token.id in found:
                    raise ValueError(f"id {token.id} stands there twice")
            except ValueError as error:
                raise ConfigError(
                    f"{file}, line {number}: not as `narseal token add` writes it: {error}"
                ) from error
            found[token.id] = token
    return list(found.values())


def _parse(line: str) -> Token:
    """The token of a line; ValueError names what has another shape, and quotes no hash."""
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not JSON") from error
    names = [field.name for field in fields(Token)]
    if odd := set(names) ^ set(tree if isinstance(tree, dict) else ()):
        raise ValueError(f"missing or unknown: {', '.join(sorted(odd))}")
    id_, name, allow, expires, hashed = (tree[name] for name in names)
    is_list = isinstance(allow, list) and all(isinstance(glob, str) for glob in allow)
    is_time = isinstance(expires, int | float) and not isinstance(expires, bool)
    wrong = {
        "id is not 12 hexadecimal digits": not (isinstance(id_, str) and _ID.fullmatch(id_)),
        "name is not a text": not isinstance(name, str),
        'allow is not a list of globs, as ["app-*"]': not is_list,
        "expires is neither null nor a Unix time": expires is not None
        and not (is_time and abs(expires) < _MOST_SECONDS),
        "hash is no argon2id hash": not (isinstance(hashed, str) and hashed.startswith(_HASH)),
    }
    if found := [sentence for sentence, is_wrong in wrong.items() if is_wrong]:
        raise ValueError("; ".join(found))
    return Token(id_, name, tuple(allow), expires, hashed)

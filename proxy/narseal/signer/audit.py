"""The signer's audit log: a line for each signature, on disk before the signature leaves.

Each line is a JSON object whose `prev` is the SHA-256 of the line before, without its newline. A
checkpoint is a line signed, over its `n` and `prev`, with a key that signs nothing else. Beside the
log, `<log>.head` says, signed too, how many lines there are and the hash of the last: what was cut off
at the end is missed by it. Blocks; one process writes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from narseal.cosign.statement import AuditHead
from narseal.custody.file import FileKey
from narseal.errors import ConfigError, MalformedKey
from narseal.nix.keys import PublicKey, Signature

_START = "0" * 64
_CHECKPOINT = "checkpoint"
_MAX_LINE = 64 << 10
_TAIL = 128 << 10
_HEADS = 64
_render = json.JSONEncoder(separators=(",", ":")).encode


class AuditLog:
    """Open for appending. ConfigError if it is not a log that can be gone on with."""

    def __init__(self, file: Path, key: FileKey) -> None:
        self._file = file
        self._key = key
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            self._log = os.open(file, flags, 0o640)
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._head = os.open(_head_file(file), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except BlockingIOError as error:
            raise ConfigError(f"{file}: another signer writes to it") from error
        except OSError as error:
            raise ConfigError(f"{file}: cannot be opened: {error.strerror}") from error
        #: Lines and the hash of the last: one value, for whoever asks while another thread writes.
        try:
            self._end = self._resume()
        except ConfigError:
            os.close(self._log)
            os.close(self._head)
            raise
        self._since_checkpoint = 0
        self._heads: OrderedDict[AuditHead, None] = OrderedDict()

    @property
    def count(self) -> int:
        """How many lines there are."""
        return self._end[0]

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Add a line for each record and return when they are on disk. OSError if they are not."""
        lines = bytearray()
        (count, last), time = self._end, _now()
        for record in records:
            count += 1
            line = _line(count, last, time, record)
            last = hashlib.sha256(line).hexdigest()
            lines += line + b"\n"
        before = os.fstat(self._log).st_size
        try:
            _write(self._log, lines)
            os.fsync(self._log)
        except OSError:
            os.ftruncate(self._log, before)  # nothing half-written stays
            raise
        self._end = (count, last)
        self._since_checkpoint += len(records)
        self._write_head()

    def checkpoint(self) -> bool:
        """Add a signed checkpoint, if there is anything new since the last; whether there was."""
        if not self._since_checkpoint:
            return False
        count, last = self._end
        signature = self._key.sign_message(_checkpoint_text(count + 1, last))
        self.append([{"kind": _CHECKPOINT, "signature": str(signature)}])
        self._since_checkpoint = 0
        os.fsync(self._head)
        return True

    def head(self) -> AuditHead | None:
        """Where the log stands, to be anchored elsewhere; None while it is empty."""
        count, last = self._end
        if not count:
            return None
        head = AuditHead(count, bytes.fromhex(last))
        self._heads[head] = None
        while len(self._heads) > _HEADS:
            self._heads.popitem(last=False)
        return head

    def had(self, head: AuditHead) -> bool:
        """Whether that is one of the last heads that were given out."""
        return head in self._heads

    def close(self) -> None:
        """A last checkpoint, and let go of the file."""
        self.checkpoint()
        os.close(self._log)
        os.close(self._head)

    def _resume(self) -> tuple[int, str]:
        """Where the log stands; a line that a crash left half-written goes."""
        size = os.fstat(self._log).st_size
        tail = os.pread(self._log, _TAIL, max(0, size - _TAIL))
        torn = len(tail) - (tail.rfind(b"\n") + 1)
        if torn:
            os.ftruncate(self._log, size - torn)
            tail = tail[: len(tail) - torn]
        head = _read_head(self._file)
        if not tail:
            if head:
                raise ConfigError(f"{self._file} is empty, and had {head[0]} lines: restore it")
            return 0, _START
        last = tail[:-1].rpartition(b"\n")[2]
        try:
            count = int(json.loads(last)["n"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self._file}: its last line is no record: {error!r}") from error
        found = hashlib.sha256(last).hexdigest()
        if head and (head[0] > count or (head[0] == count and head[1] != found)):
            raise ConfigError(
                f"{self._file} ends at line {count}, and had {head[0]}: `narseal audit verify`"
                " says more; restore it, or begin another"
            )
        return count, found

    def _write_head(self) -> None:
        """Not synchronised each time: one that is behind the log does no harm."""
        count, last = self._end
        signature = self._key.sign_message(_checkpoint_text(count, last))
        text = json.dumps({"n": count, "hash": last, "signature": str(signature)})
        os.pwrite(self._head, f"{text:<300}\n".encode(), 0)


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found."""

    lines: int
    checkpoints: int
    last: str
    #: A sentence each, which begins with where.
    problems: tuple[str, ...]


def verify(file: Path, public_key: PublicKey | None, anchors: Collection[AuditHead] = ()) -> Report:
    """Look for lines that were removed, changed, put elsewhere or cut off; ConfigError if unreadable.

    Without the audit key's public half, checkpoints and the head are not held to their signatures.
    `anchors` are heads that the log had, as a transparency log says.
    """
    problems: list[str] = []
    count = checkpoints = 0
    last, trusted = _START, 0
    head = _read_head(file)
    at_head: str | None = None
    anchored = {anchor.lines: anchor.digest.hex() for anchor in anchors}
    for number, line, record in _lines(file):
        if record is None:
            problems.append(f"line {number}: no record")
            continue
        said, prev = record.get("n"), record.get("prev")
        if said != count + 1:
            problems.append(_jump(number, count, said))
        elif prev != last:
            problems.append(f"line {number - 1}: it was changed, or line {number} was")
        count = said if isinstance(said, int) else count + 1
        if record.get("kind") == _CHECKPOINT:
            checkpoints += 1
            if public_key and not _signed(public_key, record.get("signature"), count, str(prev)):
                problems.append(
                    f"line {number}: a checkpoint that the audit key did not sign: look at the"
                    f" lines from {trusted + 1} on"
                )
            trusted = number
        last = hashlib.sha256(line).hexdigest()
        if head and count == head[0]:
            at_head = last
        if anchored.pop(count, last) != last:
            problems.append(
                f"line {number}: it is not what was anchored; what is before it changed"
            )
    problems += [f"line {n}: it was anchored, and is not there" for n in sorted(anchored)]
    problems += _against_head(head, count, at_head, public_key)
    return Report(count, checkpoints, last, tuple(problems))


def records(file: Path) -> Iterator[dict[str, Any]]:
    """The records in order; ConfigError if the log cannot be read, or a line is none."""
    for number, _, record in _lines(file):
        if record is None:
            raise ConfigError(f"{file}, line {number}: no record; `narseal audit verify` says more")
        yield record


def _against_head(
    head: tuple[int, str, str] | None,
    count: int,
    at_head: str | None,
    public_key: PublicKey | None,
) -> Iterator[str]:
    if head is None:
        if count:
            yield "the end: the head file is missing, so nobody knows what was cut off"
        return
    if public_key and not _signed(public_key, head[2], head[0], head[1]):
        yield "the end: the audit key did not sign the head file"
    if count < head[0]:
        yield f"line {count + 1}: the log ends here, and had {head[0]} lines"
    elif at_head is not None and at_head != head[1]:
        yield f"line {head[0]}: it was changed"


def _jump(number: int, count: int, said: object) -> str:
    if isinstance(said, int) and said > count + 1:
        return f"line {number}: records {count + 1} to {said - 1} are missing"
    return f"line {number}: record {said} stands where {count + 1} belongs"


def _lines(file: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    try:
        with file.open("rb") as opened:
            number = 0
            while line := opened.readline(_MAX_LINE):
                number += 1
                yield number, line.rstrip(b"\n"), _record(line)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) and line.endswith(b"\n") else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _line(number: int, last: str, time: str, record: dict[str, Any]) -> bytes:
    return _render({"n": number, "prev": last, "time": time, **record}).encode()


def _checkpoint_text(number: int, last: str) -> bytes:
    return f"narseal audit checkpoint\n{number}\n{last}\n".encode()


def _signed(key: PublicKey, text: object, number: int, last: str) -> bool:
    try:
        signature = Signature.parse(str(text))
    except MalformedKey:
        return False
    return key.verifies(_checkpoint_text(number, last), signature)


def _head_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.head")


def _read_head(file: Path) -> tuple[int, str, str] | None:
    """Lines, last hash, signature."""
    try:
        text = _head_file(file).read_text("ascii")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{_head_file(file)}: cannot be read: {error}") from error
    if not text.strip():
        return None
    try:
        tree = json.loads(text)
        return int(tree["n"]), str(tree["hash"]), str(tree["signature"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{_head_file(file)}: not a head: {error!r}") from error


def _write(descriptor: int, data: bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]

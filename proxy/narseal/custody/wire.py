"""How a narseal and its signer talk: JSON, one message or several, behind its length in four bytes."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from narseal.errors import Malformed
from narseal.nix.bounded_json import load_json

#: Bytes of one message: a statement of 1,024 subjects, in base64.
MAX_BYTES = 32 << 20
#: Messages in a frame of several, and its bytes; what is larger goes alone.
MAX_SEVERAL = 64
MAX_SEVERAL_BYTES = 64 << 10
#: What every JSON implementation has as a whole number.
MAX_ID = 2**53 - 1

_SEVERAL = re.compile(rb"[ \t\r\n]*\[")
_render = json.JSONEncoder(separators=(",", ":")).encode
_SCALARS = frozenset([str, int, float, bool, type(None)])


def encode(tree: dict[str, Any]) -> bytes:
    """A message in a frame of its own."""
    return _frame(_render(tree).encode())


def encode_several(trees: Iterable[dict[str, Any]], *, most: int = MAX_SEVERAL) -> bytes:
    """Messages in as few frames as their bounds allow, at most so many in each."""
    return b"".join(map(_frame, _bodies([_render(tree).encode() for tree in trees], most)))


def decode(body: bytes) -> dict[str, Any]:
    """A message's object; Malformed if it is none."""
    return _object(load_json(body, what="the message"))


def decode_each(body: bytes) -> Sequence[dict[str, Any] | Malformed]:
    """The message of a frame, or each of several; one that is no object does not spoil the others.

    Malformed if the frame as a whole is no JSON, or too much.
    """
    if not has_several(body):
        return [decode(body)]
    if len(body) > MAX_SEVERAL_BYTES:
        raise Malformed(f"several messages in {len(body)} bytes; {MAX_SEVERAL_BYTES} are taken")
    trees = load_json(body, what="the frame")
    if not 1 <= len(trees) <= MAX_SEVERAL:
        raise Malformed(f"{len(trees)} messages in a frame; from 1 to {MAX_SEVERAL} are taken")
    return [tree if isinstance(tree, dict) else Malformed("not a JSON object") for tree in trees]


def has_several(body: bytes) -> bool:
    """Whether a frame has several messages in it, if it is one at all."""
    return _SEVERAL.match(body) is not None


def check_request(tree: dict[str, Any]) -> None:
    """Malformed unless it is flat: texts of Unicode, numbers and nulls."""
    if not _SCALARS.issuperset(map(type, tree.values())):
        raise Malformed("a request has no objects or arrays in it")
    try:
        "".join([value for value in tree.values() if type(value) is str]).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise Malformed(f"a text is not Unicode: {error.reason}") from error


def number_of(tree: dict[str, Any]) -> int:
    """The number of a request, which its answer has, too; Malformed if it has none."""
    number = tree.get("id")
    if type(number) is not int or not 0 <= number <= MAX_ID:
        raise Malformed(f"id is not a number from 0 to {MAX_ID}")
    return number


class Frames:
    """Takes bytes as they come, gives the bodies of whole frames."""

    def __init__(self, begin: Callable[[int], bool] | None = None) -> None:
        """`begin` finds room for each frame's body, once its length is known.

        While it finds none, what has come waits: `feed(b"")` asks again.
        """
        self._begin = begin
        self._rest = bytearray()
        self._has_begun = False

    @property
    def is_within(self) -> bool:
        """Whether a frame has begun, for which there is room, and is not whole."""
        return self._has_begun

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies of frames that are whole now, to be taken to the end. Malformed if one is too long.

        Each is given before there is room for the next one.
        """
        rest = self._rest
        rest += data
        at = 0
        try:
            while len(rest) - at >= 4:
                size = int.from_bytes(rest[at : at + 4], "big")
                _check(size)
                if not self._has_begun and self._begin and not self._begin(size):
                    break
                self._has_begun = len(rest) - at - 4 < size
                if self._has_begun:
                    break
                body = bytes(rest[at + 4 : at + 4 + size])
                at += 4 + size
                yield body
        finally:
            del rest[:at]


def ask(sock: socket.socket, tree: dict[str, Any]) -> dict[str, Any]:
    """Send a message and wait for the next one; ConnectionError or TimeoutError if none comes."""
    sock.sendall(encode(tree))
    size = int.from_bytes(_exactly(sock, 4), "big")
    _check(size)
    return decode(_exactly(sock, size))


def _bodies(messages: Sequence[bytes], most: int) -> Iterator[bytes]:
    """Of frames."""
    group: list[bytes] = []
    size = 2
    for message in messages:
        if group and (len(group) == most or size + len(message) + 1 > MAX_SEVERAL_BYTES):
            yield _joined(group)
            group, size = [], 2
        group.append(message)
        size += len(message) + 1
    if group:
        yield _joined(group)


def _joined(group: Sequence[bytes]) -> bytes:
    return group[0] if len(group) == 1 else b"[" + b",".join(group) + b"]"


def _frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def _object(tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise Malformed("not a JSON object")
    return tree


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        portion = sock.recv(min(size - len(data), 1 << 20))
        if not portion:
            raise ConnectionError("the line was closed")
        data += portion
    return bytes(data)


def _check(size: int) -> None:
    if size > MAX_BYTES:
        raise Malformed(f"a message of {size} bytes; {MAX_BYTES} are taken")

"""How a narseal and its signer talk: JSON objects, each behind its length in four bytes."""

from __future__ import annotations

import json
import socket
from typing import Any

from narseal.errors import Malformed
from narseal.nix.bounded_json import load_json

#: Bytes of one message: a statement of 1,024 subjects, in base64.
MAX_BYTES = 32 << 20
#: What every JSON implementation has as a whole number.
MAX_ID = 2**53 - 1


def encode(tree: dict[str, Any]) -> bytes:
    """A message."""
    body = json.dumps(tree, separators=(",", ":")).encode()
    return len(body).to_bytes(4, "big") + body


def decode(body: bytes) -> dict[str, Any]:
    """A message's object; Malformed if it is none."""
    tree = load_json(body, what="the message")
    if not isinstance(tree, dict):
        raise Malformed("not a JSON object")
    return tree


def check_request(tree: dict[str, Any]) -> None:
    """Malformed unless it is flat: texts of Unicode, numbers and nulls."""
    if any(isinstance(value, dict | list) for value in tree.values()):
        raise Malformed("a request has no objects or arrays in it")
    try:
        "".join(value for value in tree.values() if isinstance(value, str)).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise Malformed(f"a text is not Unicode: {error.reason}") from error


def number_of(tree: dict[str, Any]) -> int:
    """The number of a request, which its answer has, too; Malformed if it has none."""
    number = tree.get("id")
    if type(number) is not int or not 0 <= number <= MAX_ID:
        raise Malformed(f"id is not a number from 0 to {MAX_ID}")
    return number


class Frames:
    """Takes bytes as they come, gives whole messages."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are whole now. Malformed if one is too long."""
        self._rest += data
        found = []
        at = 0
        while len(self._rest) - at >= 4:
            size = int.from_bytes(self._rest[at : at + 4], "big")
            _check(size)
            if len(self._rest) - at - 4 < size:
                break
            found.append(bytes(self._rest[at + 4 : at + 4 + size]))
            at += 4 + size
        del self._rest[:at]
        return found


def ask(sock: socket.socket, tree: dict[str, Any]) -> dict[str, Any]:
    """Send a message and wait for the next one; ConnectionError or TimeoutError if none comes."""
    sock.sendall(encode(tree))
    size = int.from_bytes(_exactly(sock, 4), "big")
    _check(size)
    return decode(_exactly(sock, size))


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

"""Keys that `narseal signer` holds, in a process of its own: `agent:/path/of.sock?key=NAME`."""

from __future__ import annotations

import asyncio
import base64
import binascii
import itertools
import socket
import threading
import time
from typing import Any, cast
from urllib.parse import parse_qs, unquote

from narseal.cosign.keys import CosignPublicKey
from narseal.cosign.statement import AuditHead
from narseal.custody import wire
from narseal.custody.requests import Request
from narseal.errors import ConfigError, Malformed, MalformedKey, Refused, Unavailable
from narseal.nix.keys import PublicKey, Signature

_ANSWER = 30.0  # seconds for one signature, its evidence and its audit record included
_RECONNECT = 2.0  # seconds that a signer may be away before requests fail
_PAUSE = 0.02
_CONNECT = 5.0


class AgentKey:
    """A substituter key of a signer."""

    def __init__(self, url: str) -> None:
        """ConfigError if the signer cannot be asked, or has no such key. Blocks."""
        path, _, text = _ask_key(url, "ed25519")
        self._line = _Line(path)
        try:
            self.public = PublicKey.parse(text)
        except MalformedKey as error:
            raise ConfigError(f"{url}: {error}") from error

    async def sign(self, request: Request) -> Signature:
        """The signer's signature, verified; Refused if it will not, Unavailable if it is away."""
        answer = await self._line.ask(request.render() | {"key": self.public.name})
        signature = Signature(self.public.name, _signature(answer))
        if not self.public.verifies(request.message, signature):
            raise Unavailable("the signer's signature is not by the key that it named at the start")
        return signature

    async def head(self) -> AuditHead | None:
        """Where the signer's audit log stands; None while it is empty."""
        answer = await self._line.ask({"kind": "head"})
        try:
            lines, text = answer["lines"], answer["hash"]
            return AuditHead(int(lines), bytes.fromhex(text)) if lines else None
        except (KeyError, TypeError, ValueError) as error:
            raise Unavailable(f"the signer's answer cannot be read: {error!r}") from error

    async def note(self, kind: str, name: str, reason: str) -> None:
        """Have a revocation written down."""
        tree = {"kind": "revocation", "of": kind, "name": name, "reason": reason}
        answer = await self._line.ask(tree | {"key": self.public.name})
        if "noted" not in answer:
            _signature(answer)

    def close(self) -> None:
        """Let go of the line."""
        self._line.close()


class AgentCosignKey:
    """A cosign key of a signer. Its methods block."""

    def __init__(self, url: str) -> None:
        """ConfigError if the signer cannot be asked, or has no such key."""
        self._path, self._name, text = _ask_key(url, "cosign")
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        try:
            self.public = CosignPublicKey.parse(text)
        except MalformedKey as error:
            raise ConfigError(f"{url}: {error}") from error

    def sign_digest(self, digest: bytes) -> bytes:
        """The signature over a file's SHA-256; Refused where the signer signs no files."""
        return self._ask({"kind": "digest", "digest": digest.hex()})

    def sign_statement(self, statement: bytes) -> bytes:
        """The signature over a statement in its DSSE envelope."""
        return self._ask({"kind": "statement", "statement": base64.b64encode(statement).decode()})

    def _ask(self, tree: dict[str, Any]) -> bytes:
        with self._lock:
            for last in (False, True):  # the line may have been closed since it was last used
                try:
                    if self._socket is None:
                        self._socket = _connect(self._path)
                    return _signature(wire.ask(self._socket, tree | {"id": 0, "key": self._name}))
                except (OSError, Malformed) as error:
                    if self._socket is not None:
                        self._socket.close()
                        self._socket = None
                    if last:
                        raise Unavailable(f"the signer at {self._path}: {error}") from error
        raise AssertionError


class _Line:
    """One connection to a signer: many requests on their way at a time, in the running loop."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()

    async def ask(self, tree: dict[str, Any]) -> dict[str, Any]:
        """The answer; what was on its way when the signer went is asked again when it is back."""
        until = time.monotonic() + _RECONNECT
        while True:
            try:
                connection = self._connection
                if connection is None or connection.is_closed:
                    connection = await self._connect()
                async with asyncio.timeout(_ANSWER):
                    return await connection.ask(tree)
            except TimeoutError as error:
                raise Unavailable(f"the signer at {self._path} does not answer") from error
            except OSError as error:
                if time.monotonic() > until:
                    raise Unavailable(f"the signer at {self._path} is away: {error}") from error
                await asyncio.sleep(_PAUSE)

    def close(self) -> None:
        """Close the connection."""
        if self._connection:
            self._connection.close()

    async def _connect(self) -> _Connection:
        async with self._connecting:
            if self._connection is None or self._connection.is_closed:
                loop = asyncio.get_running_loop()
                async with asyncio.timeout(_CONNECT):
                    _, self._connection = await loop.create_unix_connection(_Connection, self._path)
            return self._connection


class _Connection(asyncio.Protocol):
    """Answers find their requests by number; what is asked in one turn of the loop goes at once."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._frames = wire.Frames()
        self._unsent: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self.is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop has its own

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                tree = wire.decode(body)
                future = self._waiting.get(tree.get("id", 0))
                if future and not future.done():
                    future.set_result(tree)
        except Malformed:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionError("the line was closed"))

    async def ask(self, tree: dict[str, Any]) -> dict[str, Any]:
        """The answer; ConnectionError if the line ends before."""
        if self.is_closed:
            raise ConnectionError("the line was closed")
        loop = asyncio.get_running_loop()
        number = next(self._ids)
        future = self._waiting[number] = loop.create_future()
        try:
            if not self._unsent:
                loop.call_soon(self._send)
            self._unsent.append(wire.encode(tree | {"id": number}))
            answer: dict[str, Any] = await future
            return answer
        finally:
            del self._waiting[number]

    def close(self) -> None:
        """End the line."""
        self.is_closed = True
        if self._transport:
            self._transport.close()

    def _send(self) -> None:
        data, self._unsent = b"".join(self._unsent), []
        if self._transport and not self.is_closed:
            self._transport.write(data)


def parse_url(url: str) -> tuple[str, str | None]:
    """The socket and the name of the key of `agent:/path?key=NAME`; ConfigError else."""
    path, _, query = url.removeprefix("agent:").partition("?")
    options = parse_qs(query, keep_blank_values=True)
    if not path.startswith("/") or set(options) - {"key"} or len(options.get("key", [])) > 1:
        raise ConfigError(f"{url}: not agent:/path/of.sock?key=NAME")
    return unquote(path), options.get("key", [None])[0]


def _ask_key(url: str, kind: str) -> tuple[str, str, str]:
    """The socket of a signer, the name of its key and the public half. Blocks.

    The name may be left out where there is one key of the kind.
    """
    path, name = parse_url(url)
    try:
        with _connect(path) as sock:
            answer = wire.ask(sock, {"id": 0, "kind": "keys"})
        found = {str(k["name"]): str(k["public"]) for k in answer["keys"] if k["type"] == kind}
    except (OSError, Malformed, KeyError, TypeError) as error:
        raise ConfigError(f"{url}: the signer cannot be asked; is it running? {error}") from error
    if name is None and len(found) == 1:
        name = next(iter(found))
    if name is None or name not in found:
        known = ", ".join(found) or "none"
        raise ConfigError(f"{url}: the signer's {kind} keys are {known}: say which by ?key=NAME")
    return path, name, found[name]


def _connect(path: str) -> socket.socket:
    """To a signer, which may just be starting."""
    until = time.monotonic() + _RECONNECT
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(_CONNECT)
        try:
            sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            if time.monotonic() > until:
                raise
            time.sleep(_PAUSE)
        except OSError:
            sock.close()
            raise
        else:
            sock.settimeout(_ANSWER)
            return sock


def _signature(answer: dict[str, Any]) -> bytes:
    if "refused" in answer:
        raise Refused("signer-refused", f"the signer does not sign it: {answer['refused']}"[:500])
    if "error" in answer:
        raise Unavailable(f"the signer cannot sign now: {answer['error']}"[:500])
    try:
        return base64.b64decode(answer["signature"], validate=True)
    except (KeyError, TypeError, binascii.Error) as error:
        raise Unavailable(f"the signer's answer cannot be read: {error!r}") from error

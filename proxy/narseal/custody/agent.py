"""Keys that `narseal signer` holds, in a process of its own: `agent:/path/of.sock?key=NAME`."""

from __future__ import annotations

import asyncio
import base64
import itertools
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast
from urllib.parse import parse_qs, unquote

from narseal.cosign.keys import CosignPublicKey
from narseal.cosign.statement import AuditHead
from narseal.custody import wire
from narseal.custody.requests import Request
from narseal.errors import (
    ConfigError,
    Malformed,
    MalformedKey,
    NarsealError,
    Refused,
    Unavailable,
)
from narseal.nix.keys import PublicKey, Signature

_ANSWER = 30.0  # seconds for one signature, its evidence and its audit record included
_RECONNECT = 2.0  # seconds that a signer may be away before requests fail
_PAUSE = 0.02
_CONNECT = 5.0
_FEW = 16  # signatures that are verified on the loop, for which it stands still less than 1 ms

T = TypeVar("T")


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
        """The signer's signature, verified; Refused if it will not, Unavailable if it is away.

        It is held to the public half that was read at the start, once: whoever listens at the path
        by now, and whichever request the answer was meant for, what comes back is by that key and
        over this message, or it goes nowhere. The evidence is not looked at again.
        """
        message, public = request.message, self.public

        def read(answer: dict[str, Any]) -> Signature:
            signature = Signature(public.name, _signature(answer))
            if not public.verifies(message, signature):
                raise Unavailable(
                    f"the signer's signature is not by the key {public.name} that it had when narseal"
                    " started: if its key was changed, restart narseal"
                )
            return signature

        return await self._line.ask(request.render() | {"key": public.name}, read)

    async def head(self) -> AuditHead | None:
        """Where the signer's audit log stands; None while it is empty."""
        return await self._line.ask({"kind": "head"}, _head)

    async def note(self, kind: str, name: str, reason: str) -> None:
        """Have a revocation written down."""
        tree = {"kind": "revocation", "of": kind, "name": name, "reason": reason}
        await self._line.ask(tree | {"key": self.public.name}, _noted)

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

    async def ask(self, tree: dict[str, Any], read: Callable[[dict[str, Any]], T]) -> T:
        """What the answer is read as; what was on its way when the signer went is asked again."""
        until = time.monotonic() + _RECONNECT
        while True:
            try:
                connection = self._connection
                if connection is None or connection.is_closed:
                    connection = await self._connect()
                return await connection.ask(tree, read)
            except TimeoutError as error:
                raise Unavailable(f"the signer at {self._path} does not answer") from error
            except Malformed as error:  # it is there, and would say the same again
                raise Unavailable(f"the signer at {self._path}: {error}") from error
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


@dataclass(slots=True)
class _Waiting(Generic[T]):
    """A request whose answer has not come."""

    future: asyncio.Future[T]
    #: What an answer means; raises NarsealError if it is none that was asked for. Pure, so that any
    #: thread may call it.
    read: Callable[[dict[str, Any]], T]
    #: By the loop's clock: later it is not waited for.
    until: float

    def settle(self, outcome: T | Exception) -> None:
        if self.future.done():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class _Connection(asyncio.Protocol):
    """Answers find their requests by number; what is asked in one turn of the loop goes at once."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        #: Each until it is settled: an answer that is being read is overtaken by its deadline and by
        #: the line's end.
        self._waiting: dict[int, _Waiting[Any]] = {}
        self._frames = wire.Frames()
        self._unsent: list[dict[str, Any]] = []
        self._most = 1  # requests in a frame, until the signer says that it takes more
        self._transport: asyncio.Transport | None = None
        self._reading: set[asyncio.Task[None]] = set()
        self._watch: asyncio.TimerHandle | None = None
        self._end: type[ConnectionError | Malformed] = ConnectionError
        self._why = "the line was closed"
        self.is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop has its own
        self._transport.write(wire.encode({"id": 0, "kind": "keys"}))

    def data_received(self, data: bytes) -> None:
        group: list[tuple[_Waiting[Any], dict[str, Any]]] = []
        try:
            for body in self._frames.feed(data):
                for tree in wire.decode_each(body):
                    if isinstance(tree, Malformed):
                        raise tree
                    if tree.get("id") is None:
                        said = str(tree.get("refused"))[:300]
                        raise Malformed(
                            f"it cannot read what this narseal sends ({said}): update the older of the two"
                        )
                    number = wire.number_of(tree)
                    if number == 0:
                        self._most = _most(tree)
                    elif waiting := self._waiting.get(number):
                        group.append((waiting, tree))
        except Malformed as error:
            self._end, self._why = Malformed, str(error)
            self.close()
        if len(group) <= _FEW:
            _settle(group, _read_all(group))
        else:
            task = asyncio.get_running_loop().create_task(self._read(group))
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        if self._watch:
            self._watch.cancel()
        for waiting in self._waiting.values():
            waiting.settle(self._end(self._why))

    async def ask(self, tree: dict[str, Any], read: Callable[[dict[str, Any]], T]) -> T:
        """What the answer is read as; TimeoutError if none comes.

        If the line ends before, ConnectionError, or Malformed where that is why.
        """
        if self.is_closed:
            raise self._end(self._why)
        loop = asyncio.get_running_loop()
        number = next(self._ids)
        future: asyncio.Future[T] = loop.create_future()
        self._waiting[number] = _Waiting(future, read, loop.time() + _ANSWER)
        if self._watch is None:
            self._watch = loop.call_later(_ANSWER, self._look)
        try:
            if not self._unsent:
                loop.call_soon(self._send)
            tree["id"] = number
            self._unsent.append(tree)
            return await future
        finally:
            self._waiting.pop(number, None)

    def close(self) -> None:
        """End the line."""
        self.is_closed = True
        for task in self._reading:  # whoever waits for it learns from the line's end
            task.cancel()
        if self._transport:
            self._transport.close()

    def _send(self) -> None:
        trees, self._unsent = self._unsent, []
        if self._transport and not self.is_closed:
            self._transport.write(wire.encode_several(trees, most=self._most))

    def _look(self) -> None:
        """One clock for all that wait, of which the first waits longest."""
        loop = asyncio.get_running_loop()
        self._watch = None
        for waiting in self._waiting.values():
            if waiting.until > loop.time():
                self._watch = loop.call_at(waiting.until, self._look)
                break
            waiting.settle(TimeoutError())

    async def _read(self, group: list[tuple[_Waiting[Any], dict[str, Any]]]) -> None:
        """Verify the signatures of a group beside the loop, which would stand still for them."""
        _settle(group, await asyncio.to_thread(_read_all, group))


def _most(tree: dict[str, Any]) -> int:
    """How many requests a frame may have, as a signer's keys say; those of before know of one."""
    most = tree.get("several")
    return min(most, wire.MAX_SEVERAL) if type(most) is int and most > 0 else 1


def _read_all(group: list[tuple[_Waiting[Any], dict[str, Any]]]) -> list[Any]:
    outcomes: list[Any] = []
    for waiting, tree in group:
        try:
            outcomes.append(waiting.read(tree))
        except NarsealError as error:  # its asker's
            outcomes.append(error)
        except Exception as error:  # whatever one answer is, the others of its group are settled
            outcomes.append(_unreadable(error))
    return outcomes


def _settle(group: list[tuple[_Waiting[Any], dict[str, Any]]], outcomes: list[Any]) -> None:
    for (waiting, _), outcome in zip(group, outcomes, strict=True):
        waiting.settle(outcome)


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


def _head(answer: dict[str, Any]) -> AuditHead | None:
    try:
        lines, text = answer["lines"], answer["hash"]
        return AuditHead(int(lines), bytes.fromhex(text)) if lines else None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _unreadable(error) from error


def _noted(answer: dict[str, Any]) -> None:
    if "noted" not in answer:
        _signature(answer)


def _signature(answer: dict[str, Any]) -> bytes:
    if "refused" in answer:
        raise Refused("signer-refused", f"the signer does not sign it: {answer['refused']}"[:500])
    if "error" in answer:
        raise Unavailable(f"the signer cannot sign now: {answer['error']}"[:500])
    try:
        return base64.b64decode(answer["signature"], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> Unavailable:
    return Unavailable(f"the signer's answer cannot be read: {error!r}"[:500])

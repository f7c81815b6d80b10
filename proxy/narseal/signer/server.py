"""`narseal signer`: the process that holds the keys, behind a Unix socket, with no network."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import pwd
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import uvloop

from narseal.config.signer import SignerConfig
from narseal.custody import wire
from narseal.custody.memory import forbid_dumps, lock_all
from narseal.errors import ConfigError, Malformed, NarsealError, Unavailable
from narseal.runtime.sockets import listen, notify_systemd
from narseal.signer.rules import Approved, Peer, SigningRules, ToHash

_log = logging.getLogger(__name__)
_GROUP = 256  # signatures that share one synchronised write
_WAITING = 1024  # requests of one connection on their way
_CONNECTIONS = 64
_HASHERS = 4
_MAX_REASON = 800
_PATIENCE = 10.0  # seconds that a request waits for its turn; narseal waits for 30
_PAUSE = 0.02


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request on its way."""

    body: bytes
    line: _Line
    #: By the monotonic clock, in seconds.
    at: float


class SignerServer:
    """Requests come in, groups of them are considered, written down and signed, answers go out.

    Two threads: one considers a group while the other writes the one before. What needs a file
    hashed waits in a third, and holds up nobody.
    """

    def __init__(self, rules: SigningRules, *, users: Sequence[int]) -> None:
        self._rules = rules
        self.users = frozenset(users)
        self.lines: set[_Line] = set()
        self._asked: deque[_Asked] = deque()
        self._wake = asyncio.Event()
        self._approved: asyncio.Queue[list[tuple[_Asked, Approved]]] = asyncio.Queue(2)
        self._considering = ThreadPoolExecutor(1, thread_name_prefix="consider")
        self._hashing = ThreadPoolExecutor(_HASHERS, thread_name_prefix="hash")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="audit")

    async def serve(self, sock: socket.socket, *, checkpoint: float, stop: asyncio.Event) -> None:
        """Answer on the socket until `stop`."""
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(lambda: _Line(self), sock=sock)
        async with asyncio.TaskGroup() as group:
            works = [self._consider(group), self._write_down(), self._checkpoints(checkpoint)]
            tasks = [group.create_task(work) for work in works]
            notify_systemd("READY=1")
            await stop.wait()
            server.close()
            for task in tasks:
                task.cancel()
        for line in list(self.lines):
            line.close()
        for pool in (self._considering, self._hashing, self._writing):
            pool.shutdown(cancel_futures=True)

    def take(self, line: _Line, bodies: list[bytes]) -> None:
        """Requests of a connection, in their order."""
        now = time.monotonic()
        self._asked.extend(_Asked(body, line, now) for body in bodies)
        self._wake.set()

    async def _consider(self, group: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            taken = [self._asked.popleft() for _ in range(min(_GROUP, len(self._asked)))]
            if not self._asked:
                self._wake.clear()
            outcomes = await loop.run_in_executor(self._considering, self._decide_all, taken)
            approved = []
            answers: dict[_Line, list[bytes]] = {}
            for asked, outcome in zip(taken, outcomes, strict=True):
                if isinstance(outcome, Approved):
                    approved.append((asked, outcome))
                elif isinstance(outcome, ToHash):
                    group.create_task(self._hash(asked, outcome))
                else:
                    answers.setdefault(asked.line, []).append(wire.encode(outcome))
            _send(answers)
            if approved:
                await self._approved.put(approved)

    async def _hash(self, asked: _Asked, waiting: ToHash) -> None:
        loop = asyncio.get_running_loop()
        try:
            approved = await loop.run_in_executor(self._hashing, self._rules.hash, waiting)
        except Exception as error:  # as in _decide
            said = waiting.approved.record
            answer = self._refusal(waiting.approved.number, said, asked.line.peer, error)
            _send({asked.line: [wire.encode(answer)]})
        else:
            await self._approved.put([(asked, approved)])

    def _decide_all(self, group: list[_Asked]) -> list[Approved | ToHash | dict[str, Any]]:
        return [self._decide(asked) for asked in group]

    def _decide(self, asked: _Asked) -> Approved | ToHash | dict[str, Any]:
        """In a thread: what becomes of a request, or the answer to it."""
        tree: dict[str, Any] = {}
        number: int | None = None
        try:
            tree = wire.decode(asked.body)
            number = wire.number_of(tree)
            wire.check_request(tree)
            if tree.get("kind") == "keys":
                return {"id": number, "keys": self._rules.public_keys()}
            if tree.get("kind") == "head":
                head = self._rules.audit.head()
                found = {"lines": head.lines, "hash": head.digest.hex()} if head else {"lines": 0}
                return {"id": number, "hash": "", **found}
            return self._rules.consider(tree, asked.line.peer)
        except Exception as error:  # whatever it is, nothing is signed, and the next is served
            return self._refusal(number, tree, asked.line.peer, error)

    def _refusal(
        self, number: int | None, tree: dict[str, Any], peer: Peer, error: Exception
    ) -> dict[str, Any]:
        if isinstance(error, NarsealError):
            self._rules.refused(tree, peer, error)
            return {"id": number, "refused": str(error)[:_MAX_REASON], "reason": error.reason}
        _log.error("a request failed", exc_info=error)
        return {"id": number, "error": type(error).__name__}

    async def _write_down(self) -> None:
        """Whatever waits shares a write: signatures leave when it is on disk."""
        while True:
            group = await self._approved.get()
            while len(group) < _GROUP and not self._approved.empty():
                group += self._approved.get_nowait()
            await self._sign_in_parts(group)

    async def _sign_in_parts(self, group: list[tuple[_Asked, Approved]]) -> None:
        """As many at a time as the rate lets out. Who would wait for long is told to come again."""
        until = group[0][0].at + _PATIENCE
        while group:
            try:
                count = self._rules.allowance(len(group))
            except Unavailable as error:
                _answer(group, [str(error)] * len(group))
                return
            if count:
                part, group = group[:count], group[count:]
                _answer(part, await self._sign([item for _, item in part]))
            elif time.monotonic() < until:
                await asyncio.sleep(_PAUSE)
            else:
                late = "more signatures are asked for than `rate` lets out; try later"
                _answer(group, [late] * len(group))
                return

    async def _sign(self, approved: list[Approved]) -> Sequence[bytes | str]:
        """Signatures, or why one could not be made."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._writing, self._rules.sign, approved)
        except OSError as error:
            _log.error("the audit log cannot be written, nothing is signed: %s", error)
            return [f"the audit log cannot be written: {error}"] * len(approved)

    async def _checkpoints(self, every: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(every)
            try:
                await loop.run_in_executor(self._writing, self._rules.audit.checkpoint)
            except OSError as error:
                _log.error("no checkpoint: %s", error)


class _Line(asyncio.Protocol):
    """A connection of one who may ask."""

    def __init__(self, server: SignerServer) -> None:
        self._server = server
        self._frames = wire.Frames()
        self._transport: asyncio.Transport | None = None
        self._waiting = 0
        self.peer = Peer(-1, -1)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.peer = _peer(transport.get_extra_info("socket"))
        self._transport = cast("asyncio.Transport", transport)  # uvloop has its own
        server = self._server
        if self.peer.uid not in server.users or len(server.lines) >= _CONNECTIONS:
            who = {"uid": self.peer.uid, "pid": self.peer.pid}
            _log.warning("turned away a connection", extra=who)
            self._transport.abort()
            return
        server.lines.add(self)

    def data_received(self, data: bytes) -> None:
        if self not in self._server.lines or self._transport is None:
            return
        try:
            bodies = self._frames.feed(data)
        except Malformed as error:
            _log.warning("a connection ends: %s", error, extra={"uid": self.peer.uid})
            self.close()
            return
        if bodies:
            self._waiting += len(bodies)
            if self._waiting > _WAITING:
                self._transport.pause_reading()
            self._server.take(self, bodies)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.lines.discard(self)

    def send(self, answers: list[bytes]) -> None:
        """Answer some of what was asked."""
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(b"".join(answers))
        before, self._waiting = self._waiting, self._waiting - len(answers)
        if before > _WAITING >= self._waiting:
            self._transport.resume_reading()

    def close(self) -> None:
        """End the connection."""
        self._server.lines.discard(self)
        if self._transport:
            self._transport.close()


def _answer(group: Sequence[tuple[_Asked, Approved]], outcomes: Sequence[bytes | str]) -> None:
    """Each its signature; or why there is none now, which is no refusal."""
    answers: dict[_Line, list[bytes]] = {}
    for (asked, item), outcome in zip(group, outcomes, strict=True):
        answer: dict[str, Any] = {"id": item.number}
        if isinstance(outcome, str):
            answer["error"] = outcome
        elif item.kind == "revocation":
            answer["noted"] = True
        else:
            answer["signature"] = base64.b64encode(outcome).decode()
        answers.setdefault(asked.line, []).append(wire.encode(answer))
    _send(answers)


def _send(answers: dict[_Line, list[bytes]]) -> None:
    for line, frames in answers.items():
        line.send(frames)


def run(config: SignerConfig) -> None:
    """Hold the keys and sign until SIGTERM. ConfigError if it cannot begin."""
    forbid_dumps()
    locked = lock_all()
    rules = SigningRules(config)
    if not locked:
        _log.info("the process is not locked in memory (LimitMEMLOCK); its keys' own pages are")
    users = [_uid(name) for name in config.allow_users] or [os.geteuid()]
    [sock], *_ = listen(config.listen, 1)
    uvloop.run(_serve(rules, config, sock, users))


async def _serve(
    rules: SigningRules, config: SignerConfig, sock: socket.socket, users: list[int]
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    _log.info("signs", extra={"keys": [key["name"] for key in rules.public_keys()]})
    try:
        server = SignerServer(rules, users=users)
        await server.serve(sock, checkpoint=config.audit.checkpoint, stop=stop)
    finally:
        rules.close()
        if config.listen.startswith("unix:"):
            os.unlink(config.listen.removeprefix("unix:"))


def _peer(sock: socket.socket) -> Peer:
    """SO_PEERCRED."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return Peer(uid, pid)


def _uid(name: str) -> int:
    try:
        return int(name) if name.isascii() and name.isdigit() else pwd.getpwnam(name).pw_uid
    except KeyError as error:
        raise ConfigError(f"allow_users: there is no user {name}") from error

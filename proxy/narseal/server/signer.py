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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from narseal.config.signer import SignerConfig
from narseal.custody import wire
from narseal.custody.memory import forbid_dumps, lock_all
from narseal.errors import ConfigError, Malformed, NarsealError
from narseal.pipeline.signing import Agreed, Desk, Peer
from narseal.server.sockets import listen, notify_systemd

_log = logging.getLogger(__name__)
_GROUP = 256  # signatures that share one synchronised write
_WAITING = 1024  # requests of one connection on their way
_CONNECTIONS = 64
_CHECKERS = 4


@dataclass(slots=True)
class _Asked:
    agreed: Agreed
    answer: asyncio.Future[bytes | str]


class SignerServer:
    """Reads requests, has each considered, writes groups of them down, answers."""

    def __init__(self, desk: Desk, *, users: Sequence[int]) -> None:
        self._desk = desk
        self._users = frozenset(users)
        self._queue: asyncio.Queue[_Asked] = asyncio.Queue(_WAITING)
        # signatures are verified and small NARs hashed here, large ones hold up one of these only
        self._checkers = ThreadPoolExecutor(_CHECKERS, thread_name_prefix="consider")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="audit")
        self._connections = 0

    async def serve(self, sock: socket.socket, *, checkpoint: float, stop: asyncio.Event) -> None:
        """Answer on the socket until `stop`."""
        server = await asyncio.start_unix_server(self._connection, sock=sock, limit=1 << 20)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._write_down()),
                group.create_task(self._checkpoints(checkpoint)),
            ]
            notify_systemd("READY=1")
            await stop.wait()
            server.close()
            for task in tasks:
                task.cancel()
        self._checkers.shutdown(cancel_futures=True)
        self._writer.shutdown()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = _peer(writer.get_extra_info("socket"))
        if peer.uid not in self._users or self._connections >= _CONNECTIONS:
            _log.warning("turned away a connection", extra={"uid": peer.uid, "pid": peer.pid})
            writer.close()
            return
        self._connections += 1
        slots = asyncio.Semaphore(_WAITING)
        tasks: set[asyncio.Task[None]] = set()
        try:
            while (body := await wire.read(reader)) is not None:
                await slots.acquire()
                task = asyncio.create_task(self._answer(body, peer, writer, slots))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except (Malformed, OSError) as error:
            _log.warning("a connection ends: %s", error, extra={"uid": peer.uid, "pid": peer.pid})
        finally:
            self._connections -= 1
            for task in tasks:
                task.cancel()
            writer.close()

    async def _answer(
        self, body: bytes, peer: Peer, writer: asyncio.StreamWriter, slots: asyncio.Semaphore
    ) -> None:
        try:
            answer = await self._decide(body, peer)
            with suppress(OSError):
                writer.write(wire.encode(answer))
                await writer.drain()
        finally:
            slots.release()

    async def _decide(self, body: bytes, peer: Peer) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        number: object = None
        try:
            tree = wire.decode(body)
            number = tree.get("id")
            if tree.get("kind") == "keys":
                return {"id": number, "keys": self._desk.public_keys()}
            loop = asyncio.get_running_loop()
            agreed = await loop.run_in_executor(self._checkers, self._desk.consider, tree, peer)
            asked = _Asked(agreed, loop.create_future())
            await self._queue.put(asked)
            outcome = await asked.answer
        except NarsealError as error:
            self._desk.refused(tree, peer, error)
            return {"id": number, "refused": str(error)[:800], "reason": error.reason}
        except Exception as error:  # whatever it is, nothing is signed, and the next is served
            _log.exception("a request failed")
            return {"id": number, "error": type(error).__name__}
        if isinstance(outcome, str):
            return {"id": number, "error": outcome}
        return {"id": number, "signature": base64.b64encode(outcome).decode()}

    async def _write_down(self) -> None:
        """Whatever waits shares a write: signatures leave when it is on disk."""
        loop = asyncio.get_running_loop()
        while True:
            group = [await self._queue.get()]
            while len(group) < _GROUP and not self._queue.empty():
                group.append(self._queue.get_nowait())
            agreed = [asked.agreed for asked in group]
            try:
                outcomes = await loop.run_in_executor(self._writer, self._desk.sign, agreed)
            except (NarsealError, OSError) as error:
                for asked in group:
                    if not asked.answer.done():
                        asked.answer.set_exception(
                            error
                            if isinstance(error, NarsealError)
                            else OSError(f"the audit log cannot be written: {error}")
                        )
                continue
            for asked, outcome in zip(group, outcomes, strict=True):
                if not asked.answer.done():
                    asked.answer.set_result(outcome)

    async def _checkpoints(self, every: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(every)
            try:
                await loop.run_in_executor(self._writer, self._desk.audit.checkpoint)
            except OSError as error:
                _log.error("no checkpoint: %s", error)


def run(config: SignerConfig) -> None:
    """Hold the keys and sign until SIGTERM. ConfigError if it cannot begin."""
    forbid_dumps()
    locked = lock_all()
    desk = Desk(config)
    if not locked:
        _log.info("the process is not locked in memory (LimitMEMLOCK); its keys' own pages are")
    users = [_uid(name) for name in config.allow_users] or [os.geteuid()]
    [sock], *_ = listen(config.listen, 1)
    asyncio.run(_serve(desk, config, sock, users))


async def _serve(desk: Desk, config: SignerConfig, sock: socket.socket, users: list[int]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    _log.info("signs", extra={"keys": [key["name"] for key in desk.public_keys()]})
    try:
        server = SignerServer(desk, users=users)
        await server.serve(sock, checkpoint=config.audit.checkpoint, stop=stop)
    finally:
        desk.close()
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

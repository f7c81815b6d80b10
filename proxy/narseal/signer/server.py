"""`narseal signer`: the process that holds the keys, behind a Unix socket, with no network."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import pwd
import signal
import socket
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvloop

from narseal.config.signer import SignerConfig
from narseal.custody import wire
from narseal.custody.memory import forbid_dumps, lock_all
from narseal.errors import ConfigError, Malformed, NarsealError, Unavailable
from narseal.runtime.allocation import give_back_large
from narseal.runtime.sockets import listen, notify_systemd
from narseal.signer.lines import Frame, Line, Lines
from narseal.signer.rules import Approved, Peer, SigningRules, ToHash

_log = logging.getLogger(__name__)
_GROUP = 256  # signatures that share one synchronised write
_HASHERS = 4
_MAX_REASON = 800
_PATIENCE = 10.0  # seconds that a request waits for its turn; narseal waits for 30
_PAUSE = 0.02

_Approved = tuple[Frame, Approved]
#: What becomes of a request: it is approved, or will be once a file was hashed, or this is the answer.
_Outcome = Approved | ToHash | dict[str, Any]


class SignerServer:
    """Requests come in, groups of them are considered, written down and signed, answers go out.

    Some threads consider a group each while another writes and signs what they approved. What needs
    a file hashed waits in threads of its own, and holds up nobody.
    """

    def __init__(self, rules: SigningRules, *, users: Sequence[int], threads: int) -> None:
        """`threads` consider requests, a group each at a time."""
        self._rules = rules
        self._threads = threads
        self._lines = Lines(users, self._take)
        self._asked: deque[Frame] = deque()
        self._wake = asyncio.Event()
        self._approved: asyncio.Queue[list[_Approved]] = asyncio.Queue(2)
        self._considering = ThreadPoolExecutor(threads, thread_name_prefix="consider")
        self._hashing = ThreadPoolExecutor(_HASHERS, thread_name_prefix="hash")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="audit")

    async def serve(self, sock: socket.socket, *, checkpoint: float, stop: asyncio.Event) -> None:
        """Answer on the socket until `stop`."""
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(self._lines.connect, sock=sock)
        async with asyncio.TaskGroup() as group:
            works = [self._consider(group) for _ in range(self._threads)]
            works += [self._write_down(), self._checkpoints(checkpoint)]
            tasks = [group.create_task(work) for work in works]
            notify_systemd("READY=1")
            await stop.wait()
            server.close()
            for task in tasks:
                task.cancel()
        self._lines.close()
        for pool in (self._considering, self._hashing, self._writing):
            pool.shutdown(cancel_futures=True)

    def _take(self, frame: Frame) -> None:
        self._asked.append(frame)
        self._wake.set()

    async def _next(self) -> list[Frame]:
        """A group of what waits longest."""
        while not self._asked:
            self._wake.clear()
            await self._wake.wait()
        group: list[Frame] = []
        weight = 0
        while self._asked and weight < _GROUP:
            group.append(self._asked.popleft())
            weight += group[-1].weight
        return group

    async def _consider(self, group: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            frames = await self._next()
            decided = await loop.run_in_executor(self._considering, self._decide_all, frames)
            approved: list[_Approved] = []
            answers: list[tuple[Frame, dict[str, Any]]] = []
            for frame, outcomes in zip(frames, decided, strict=True):
                frame.left = len(outcomes)
                for outcome in outcomes:
                    if isinstance(outcome, Approved):
                        approved.append((frame, outcome))
                    elif isinstance(outcome, ToHash):
                        group.create_task(self._hash(frame, outcome))
                    else:
                        answers.append((frame, outcome))
            _send(answers)
            if approved:
                await self._approved.put(approved)

    async def _hash(self, frame: Frame, waiting: ToHash) -> None:
        loop = asyncio.get_running_loop()
        try:
            approved = await loop.run_in_executor(self._hashing, self._rules.hash, waiting)
        except Exception as error:  # as in _decide
            said = waiting.approved.record
            answer = self._refusal(waiting.approved.number, said, frame.line.peer, error)
            _send([(frame, answer)])
        else:
            await self._approved.put([(frame, approved)])

    def _decide_all(self, group: list[Frame]) -> list[list[_Outcome]]:
        return [self._decide_each(frame) for frame in group]

    def _decide_each(self, frame: Frame) -> list[_Outcome]:
        """In a thread: what becomes of each request of a frame, or the answer to it."""
        peer = frame.line.peer
        try:
            trees = wire.decode_each(frame.body)
        except Exception as error:  # whatever it is, nothing is signed, and the next is served
            return [self._refusal(None, {}, peer, error)]
        return [self._decide(tree, peer) for tree in trees]

    def _decide(self, tree: dict[str, Any] | Malformed, peer: Peer) -> _Outcome:
        if isinstance(tree, Malformed):
            return self._refusal(None, {}, peer, tree)
        number: int | None = None
        try:
            number = wire.number_of(tree)
            wire.check_request(tree)
            if tree.get("kind") == "keys":
                keys = self._rules.public_keys()
                return {"id": number, "keys": keys, "several": wire.MAX_SEVERAL}
            if tree.get("kind") == "head":
                head = self._rules.audit.head()
                found = {"lines": head.lines, "hash": head.digest.hex()} if head else {"lines": 0}
                return {"id": number, "hash": "", **found}
            return self._rules.consider(tree, peer)
        except Exception as error:  # as in _decide_each
            return self._refusal(number, tree, peer, error)

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

    async def _sign_in_parts(self, group: list[_Approved]) -> None:
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


def _answer(group: Sequence[_Approved], outcomes: Sequence[bytes | str]) -> None:
    """Each its signature; or why there is none now, which is no refusal."""
    answers: list[tuple[Frame, dict[str, Any]]] = []
    for (frame, item), outcome in zip(group, outcomes, strict=True):
        answer: dict[str, Any] = {"id": item.number}
        if isinstance(outcome, str):
            answer["error"] = outcome
        elif item.kind == "revocation":
            answer["noted"] = True
        else:
            answer["signature"] = base64.b64encode(outcome).decode()
        answers.append((frame, answer))
    _send(answers)


def _send(answers: Sequence[tuple[Frame, dict[str, Any]]]) -> None:
    by_line: dict[Line, list[tuple[Frame, dict[str, Any]]]] = {}
    for answer in answers:
        by_line.setdefault(answer[0].line, []).append(answer)
    for line, answered in by_line.items():
        line.answer(answered)


def run(config: SignerConfig) -> None:
    """Hold the keys and sign until SIGTERM. ConfigError if it cannot begin."""
    forbid_dumps()
    give_back_large()
    locked = lock_all()
    rules = SigningRules(config)
    if not locked:
        _log.info("the process is not locked in memory (LimitMEMLOCK); its keys' own pages are")
    users = allowed(config)
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
        server = SignerServer(rules, users=users, threads=_threads())
        await server.serve(sock, checkpoint=config.audit.checkpoint, stop=stop)
    finally:
        rules.close()
        if config.listen.startswith("unix:"):
            os.unlink(config.listen.removeprefix("unix:"))


def allowed(config: SignerConfig) -> list[int]:
    """The user ids for whom it signs; ConfigError if there is no such user."""
    return [_uid(name) for name in config.allow_users] or [os.geteuid()]


def _threads() -> int:
    """Verifying takes two thirds of a signature's time, without the interpreter's lock.

    What it leaves keeps three threads busy at most. One core is for who writes, and for narseal.
    """
    return min(3, max(1, len(os.sched_getaffinity(0)) - 1))


def _uid(name: str) -> int:
    try:
        return int(name) if name.isascii() and name.isdigit() else pwd.getpwnam(name).pw_uid
    except KeyError as error:
        raise ConfigError(
            f"allow_users: there is no user {name}; name the one that narseal runs as"
        ) from error

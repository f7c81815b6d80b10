"""The parent of the workers: opens everything once, starts them, restarts what dies."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import uvloop
from prometheus_client.multiprocess import mark_process_dead

from narseal.config import Config
from narseal.nix.cache_info import CacheInfo
from narseal.pipeline.substituter import load_keys
from narseal.server.sockets import listen, notify_systemd
from narseal.server.worker import tls_context, work
from narseal.storage import Epoch, LocalStorage, epoch_file, migrate
from narseal.telemetry import metrics

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_QUICK = 5.0  # a worker that lived shorter is restarted later and later
_MAX_DELAY = 5.0
_GRACE = 5.0  # beyond the workers' own time to shut down


@dataclass
class _Worker:
    slot: int
    started: float


class Supervisor:
    """Everything that all workers share. ConfigError before any of them was started."""

    def __init__(self, config: Config) -> None:
        self._config = config
        load_keys(config)
        tls_context(config)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        migrate(config.storage.index)
        info = CacheInfo(config.store_dir, want_mass_query=True, priority=config.priority)
        self._storage = LocalStorage(config.storage.url)  # holds the folder's lock
        self._storage.prepare(info)
        self._epoch = Epoch(epoch_file(config.storage.index))
        self.sockets = listen(config.listen, config.workers)
        metrics_address = config.metrics.listen
        self._metrics_sockets: list[list[socket.socket]] = (
            listen(metrics_address, config.workers)
            if metrics_address
            else [[] for _ in range(config.workers)]
        )
        self._workers: dict[int, _Worker] = {}
        self._due: dict[int, float] = {}
        self._delays = [0.0] * config.workers
        self._stopping = False
        self._exit_code = 0
        self._awaited = config.workers
        self._ready_read, self._ready_write = os.pipe()
        self._wake_read, self._wake_write = os.pipe()

    def run(self, on_ready: Callable[[], None]) -> int:
        """Run until SIGTERM or SIGINT; returns the exit code."""
        for descriptor in (self._wake_write, self._wake_read):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(self._wake_write)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for slot in range(self._config.workers):
            self._start(slot)
        deadline = float("inf")
        while self._workers or not self._stopping:
            next_due = min(self._due.values(), default=float("inf")) - time.monotonic()
            readable, _, _ = select.select(
                [self._wake_read, self._ready_read], [], [], min(1.0, max(0.0, next_due))
            )
            if self._ready_read in readable:
                self._count_ready(on_ready)
            if self._wake_read in readable:
                os.read(self._wake_read, 4096)
            self._reap()
            if self._stopping:
                now = time.monotonic()
                deadline = min(deadline, now + self._config.limits.shutdown_timeout * 2 + _GRACE)
                if now > deadline:
                    self._signal(signal.SIGKILL)
            else:
                self._restart_due()
        return self._exit_code

    def _stop(self, *_: object) -> None:
        if not self._stopping:
            self._stopping = True
            notify_systemd("STOPPING=1")
            self._signal(signal.SIGTERM)
            self._close_sockets(keep=None)  # from now on nobody is left waiting in a queue

    def _close_sockets(self, keep: int | None) -> None:
        """Close our copies of the listening sockets, but for those of one worker."""
        kept = [] if keep is None else [*self.sockets[keep], *self._metrics_sockets[keep]]
        for group in (*self.sockets, *self._metrics_sockets):
            for sock in group:
                if sock not in kept:
                    sock.close()

    def _signal(self, number: int) -> None:
        for pid in self._workers:
            os.kill(pid, number)

    def _count_ready(self, on_ready: Callable[[], None]) -> None:
        before = self._awaited
        self._awaited -= len(os.read(self._ready_read, 256))
        if before > 0 >= self._awaited:
            notify_systemd("READY=1")
            on_ready()

    def _reap(self) -> None:
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            worker = self._workers.pop(pid)
            self._storage.sweep(pid)
            mark_process_dead(pid)  # type: ignore[no-untyped-call]
            if self._stopping:
                continue
            if self._awaited > 0:
                _log.error("a worker could not start", extra={"pid": pid})
                self._exit_code = 1
                self._stop()
                continue
            quick = time.monotonic() - worker.started < _QUICK
            delay = min(_MAX_DELAY, 2 * self._delays[worker.slot] + 0.05) if quick else 0.0
            self._delays[worker.slot] = delay
            self._due[worker.slot] = time.monotonic() + delay
            metrics.worker_restarts.inc()
            _log.error(
                "a worker died and is restarted",
                extra={"pid": pid, "status": os.waitstatus_to_exitcode(status), "delay": delay},
            )

    def _restart_due(self) -> None:
        now = time.monotonic()
        for slot in [slot for slot, due in self._due.items() if due <= now]:
            del self._due[slot]
            self._start(slot)

    def _start(self, slot: int) -> None:
        pid = os.fork()
        if pid:
            self._workers[pid] = _Worker(slot, time.monotonic())
            return
        code = 1
        try:
            self._become_worker(slot)
            code = 0
        except BaseException:
            _log.exception("a worker failed")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _become_worker(self, slot: int) -> None:
        """In the child, until it is told to stop."""
        self._close_sockets(keep=slot)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        uvloop.run(self._work(slot))

    async def _work(self, slot: int) -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await work(
            self._config,
            epoch=self._epoch,
            sockets=self.sockets[slot],
            metrics_sockets=self._metrics_sockets[slot],
            ready=self._tell_ready,
            stop=stop,
        )

    def _tell_ready(self) -> None:
        gc.collect()
        gc.freeze()  # what is there now stays: no later collection looks through it again
        os.write(self._ready_write, b"r")

"""The parent of the workers: opens everything once, starts them, restarts what dies.

A changed configuration gets workers of its own, on the same sockets; when they are ready, those of
the old one take no more connections and end with their last answer.
"""

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
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import uvloop
from prometheus_client.multiprocess import mark_process_dead

from narseal.config import Config
from narseal.errors import NarsealError
from narseal.nix.cache_info import CacheInfo
from narseal.runtime.board import Board
from narseal.runtime.shared_flights import SharedFlights
from narseal.runtime.sockets import listen, notify_systemd
from narseal.runtime.watching import Watch
from narseal.server.check import check, check_change, named_files
from narseal.server.worker import Stop, work
from narseal.storage import Epoch, LocalStorage, join
from narseal.storage.revocations import revoked_at
from narseal.telemetry import metrics
from narseal.telemetry.logs import configure
from narseal.telemetry.series import flush

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_QUICK = 5.0  # a worker that lived shorter is restarted later and later
_MAX_DELAY = 5.0
_GRACE = 5.0  # beyond the workers' own time to shut down


_LOOK = 0.2  # seconds between two looks at the files
_SEATS = 4  # for each worker: those of configurations before go on until their last reader has all
_MOST_SEATS = 64
_START = 30.0  # workers of a changed configuration are ready by then, or given up


@dataclass
class _Worker:
    slot: int
    generation: int
    started: float
    #: At the board; None: it shares no flights.
    seat: int | None


@dataclass
class _Change:
    """A configuration whose workers are starting."""

    config: Config
    generation: int
    awaited: int
    deadline: float


class Supervisor:
    """Everything that all workers share. ConfigError before any of them was started."""

    def __init__(self, config: Config, *, file: Path, load: Callable[[], Config]) -> None:
        """`load` reads the configuration anew from `file`."""
        self._config = config
        self._file = file
        self._load = load
        keys = check(config).keys
        self._watch = Watch()
        self._watch.follow([file, *named_files(config)])
        self._generation = 0
        self._newest = 0
        self._change: _Change | None = None
        self._reload_asked = False
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._storage = LocalStorage(config.storage.url)
        info = CacheInfo(config.store_dir, want_mass_query=True, priority=config.priority)
        join(config.storage.index, self._storage, info)  # holds the folder's lock from now on
        revoked = revoked_at(config.storage.index)
        _warn_of_revoked(config, {key.name for key in keys} & revoked, revoked)
        #: Of the substituter keys, less revoked ones.
        self.public_keys = [key for key in keys if key.name not in revoked]
        self._epoch = Epoch.of(config.storage.index)
        self.sockets = listen(config.listen, config.workers)
        metrics_address = config.metrics.listen
        self._metrics_sockets: list[list[socket.socket]] = (
            listen(metrics_address, config.workers)
            if metrics_address
            else [[] for _ in range(config.workers)]
        )
        seats = min(_SEATS * config.workers, _MOST_SEATS)
        self._board = Board(seats) if config.workers > 1 else None
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
        signal.signal(signal.SIGHUP, self._ask_reload)
        metrics.reload_successful.set(1)
        metrics.reload_seconds.set_to_current_time()
        for slot in range(self._config.workers):
            self._start(slot, self._config, self._generation)
        deadline = float("inf")
        while self._workers or not self._stopping:
            next_due = min(self._due.values(), default=float("inf")) - time.monotonic()
            readable, _, _ = select.select(
                [self._wake_read, self._ready_read], [], [], min(_LOOK, max(0.0, next_due))
            )
            if self._ready_read in readable:
                self._count_ready(on_ready)
            if self._wake_read in readable:
                os.read(self._wake_read, 4096)
            self._reap()
            flush()  # before any fork, whose child would count the same again
            if self._stopping:
                now = time.monotonic()
                deadline = min(deadline, now + self._config.limits.shutdown_timeout * 2 + _GRACE)
                if now > deadline:
                    self._signal(signal.SIGKILL)
            else:
                self._restart_due()
                self._look_for_changes()
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

    def _signal(self, number: int, which: Callable[[_Worker], bool] = lambda _: True) -> None:
        for pid, worker in self._workers.items():
            if which(worker):
                os.kill(pid, number)

    def _count_ready(self, on_ready: Callable[[], None]) -> None:
        for generation in os.read(self._ready_read, 256):
            if self._change and generation == self._change.generation & 0xFF:
                self._change.awaited -= 1
                if self._change.awaited == 0:
                    self._take_over()
            elif self._awaited > 0:
                self._awaited -= 1
                if self._awaited == 0:
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
            if self._board and worker.seat is not None:
                self._board.leave(worker.seat)
            if self._stopping:
                continue
            if status:
                self._epoch.ask_for_repair()  # of what it was to write behind its answers
                self._epoch.arrive()  # what it admitted last, and told nobody of
            if self._change and worker.generation == self._change.generation:
                self._give_up("a worker could not start with it")
                continue
            if worker.generation != self._generation:
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

    def _ask_reload(self, *_: object) -> None:
        self._reload_asked = True

    def _look_for_changes(self) -> None:
        if self._change:
            if time.monotonic() > self._change.deadline:
                self._give_up(f"its workers are not ready after {_START:.0f} s")
            return
        if self._awaited == 0 and (self._watch.changed() or self._reload_asked):
            self._reload_asked = False
            self._watch.settle()
            self._reload()

    def _reload(self) -> None:
        """Start workers for a changed configuration; a wrong one is refused, and nothing changes."""
        try:
            config = self._load()
            self._watch.follow([self._file, *named_files(config)])
            check_change(self._config, config)
            check(config)
        except NarsealError as error:
            metrics.reload_successful.set(0)
            _log.error("the changed configuration is refused, the old one goes on: %s", error)
            return
        configure(config.log.level)
        notify_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        self._newest += 1
        deadline = time.monotonic() + _START
        self._change = _Change(config, self._newest, config.workers, deadline)
        for slot in range(config.workers):
            self._start(slot, config, self._newest)

    def _take_over(self) -> None:
        """The workers of the changed configuration are ready: the others end in their time."""
        assert self._change is not None  # the caller saw to it
        self._config, self._generation = self._change.config, self._change.generation
        self._change = None
        self._due.clear()
        self._signal(signal.SIGHUP, lambda worker: worker.generation != self._generation)
        metrics.reload_successful.set(1)
        metrics.reload_seconds.set_to_current_time()
        notify_systemd("READY=1")
        _log.info("the changed configuration is in force")

    def _give_up(self, why: str) -> None:
        assert self._change is not None  # the caller saw to it
        given_up = self._change.generation
        self._change = None
        self._signal(signal.SIGTERM, lambda worker: worker.generation == given_up)
        configure(self._config.log.level)
        metrics.reload_successful.set(0)
        notify_systemd("READY=1")
        _log.error("the changed configuration is refused, the old one goes on: %s", why)

    def _restart_due(self) -> None:
        now = time.monotonic()
        for slot in [slot for slot, due in self._due.items() if due <= now]:
            del self._due[slot]
            self._start(slot, self._config, self._generation)

    def _start(self, slot: int, config: Config, generation: int) -> None:
        worker = _Worker(slot, generation, time.monotonic(), self._free_seat())
        pid = os.fork()
        if pid:
            self._workers[pid] = worker
            return
        code = 1
        try:
            self._become_worker(worker, config)
            code = 0
        except BaseException:
            _log.exception("a worker failed")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _free_seat(self) -> int | None:
        taken = {worker.seat for worker in self._workers.values()}
        seats = range(self._board.seats if self._board else 0)
        free = next((seat for seat in seats if seat not in taken), None)
        if free is None and self._board:
            _log.warning(
                "a worker shares no flights with the others: %d places are taken", len(seats)
            )
        return free

    def _become_worker(self, worker: _Worker, config: Config) -> None:
        """In the child, until it is told to stop."""
        self._close_sockets(keep=worker.slot)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        uvloop.run(self._work(worker, config))

    async def _work(self, worker: _Worker, config: Config) -> None:
        stop = Stop()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.now)
        loop.add_signal_handler(signal.SIGHUP, stop.in_time)
        await work(
            config,
            epoch=self._epoch,
            flights=self._flights(worker),
            sockets=self.sockets[worker.slot],
            metrics_sockets=self._metrics_sockets[worker.slot],
            ready=lambda: self._tell_ready(worker.generation),
            stop=stop,
        )

    def _flights(self, worker: _Worker) -> SharedFlights | None:
        if self._board is None or worker.seat is None:
            return None
        return SharedFlights(
            self._board,
            worker.seat,
            kin=worker.generation,
            on_joined=metrics.flights_joined.inc,
        )

    def _tell_ready(self, generation: int) -> None:
        gc.collect()
        gc.freeze()  # what is there now stays: no later collection looks through it again
        os.write(self._ready_write, bytes([generation & 0xFF]))


def _warn_of_revoked(config: Config, own: Collection[str], revoked: Collection[str]) -> None:
    for name in sorted(own):
        _log.warning(
            "the key %s is revoked and signs nothing: take its [[signing.key]] out of the configuration",
            name,
        )
    for upstream in config.upstream:
        for key in upstream.public_keys:
            if key.name in revoked:
                _log.warning(
                    "the key %s of %s is revoked, and nothing is admitted on its word: replace it in"
                    " public_keys",
                    key.name,
                    upstream.url,
                )

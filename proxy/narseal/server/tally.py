"""The one place where every answer is counted: the hot path's, and aiohttp's."""

from __future__ import annotations

import logging

from narseal.pipeline.caches import Hot
from narseal.telemetry import metrics
from narseal.telemetry.series import Answers, Counter

_log = logging.getLogger("narseal.access")


class Tally:
    """Counts one worker's answers, and logs them if it is to."""

    def __init__(self, *, access_log: bool) -> None:
        self._access_log = access_log
        self._narinfos = _from_memory("narinfo", metrics.hot_hits)
        self._nars = _from_memory("nar", metrics.nar_bytes.labels("memory"))

    def hit(self, answer: Hot, target: bytes, seconds: float) -> None:
        """An answer from memory by the hot path."""
        if answer.route == "nar":
            self._nars.add(seconds, answer.body_size)
        else:
            self._narinfos.add(seconds, 1)
        if self._access_log:
            self._line("GET", target.decode("ascii"), 200, seconds)

    def answered(self, route: str, method: str, path: str, status: int, seconds: float) -> None:
        """Any other answer."""
        metrics.requests.labels(route, str(status)).inc()
        metrics.request_seconds.labels(route).observe(seconds)
        if self._access_log:
            self._line(method, path, status, seconds)

    @staticmethod
    def _line(method: str, path: str, status: int, seconds: float) -> None:
        fields = {"method": method, "path": path, "status": status, "seconds": round(seconds, 6)}
        _log.info("%s %s %d", method, path, status, extra=fields)


def _from_memory(route: str, amount: Counter) -> Answers:
    seconds, count = metrics.request_seconds.labels(route), metrics.requests.labels(route, "200")
    return Answers(seconds, count, amount)

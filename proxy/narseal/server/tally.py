"""What the hot path counts, and the one place where every other answer is counted too."""

from __future__ import annotations

import logging

from narseal.pipeline.caches import Hot
from narseal.telemetry import metrics

_log = logging.getLogger("narseal.access")


class Tally:
    """Counts of one worker; those of the hot path are collected and flushed every half second."""

    def __init__(self, *, access_log: bool) -> None:
        self._access_log = access_log
        self._routes = {
            route: metrics.Bulk(metrics.request_seconds.labels(route))
            for route in ("narinfo", "nar")
        }
        self._nar_bytes = 0

    def hit(self, answer: Hot, target: bytes, seconds: float) -> None:
        """An answer from memory by the hot path."""
        self._routes[answer.route].observe(seconds)
        if answer.route == "nar":
            self._nar_bytes += answer.body_size
        if self._access_log:
            self._line("GET", target.decode("ascii"), 200, seconds)

    def answered(self, route: str, method: str, path: str, status: int, seconds: float) -> None:
        """An answer through aiohttp."""
        metrics.requests.labels(route, str(status)).inc()
        metrics.request_seconds.labels(route).observe(seconds)
        if self._access_log:
            self._line(method, path, status, seconds)

    def flush(self) -> None:
        """Add the hot path's counts to the metrics."""
        for route, bulk in self._routes.items():
            if count := bulk.flush():
                metrics.requests.labels(route, "200").inc(count)
                if route == "narinfo":
                    metrics.hot_hits.inc(count)
        if self._nar_bytes:
            metrics.nar_bytes.labels("memory").inc(self._nar_bytes)
            self._nar_bytes = 0

    @staticmethod
    def _line(method: str, path: str, status: int, seconds: float) -> None:
        fields = {"method": method, "path": path, "status": status, "seconds": round(seconds, 6)}
        _log.info("%s %s %d", method, path, status, extra=fields)

"""Saying that something was refused: one counter, one structured log line."""

from __future__ import annotations

import logging

from narseal.errors import Malformed, Refused
from narseal.telemetry import metrics

_log = logging.getLogger(__name__)


def reject(error: Refused | Malformed, *, upstream: str, thing: str) -> None:
    """Count and log a refusal of a thing as it came from `upstream`."""
    metrics.rejected.labels(error.reason).inc()
    _log.warning(
        "refused: %s",
        error,
        extra={"reason": error.reason, "upstream": upstream, "object": thing},
    )

"""Every metric of narseal, present at zero from the start, right across workers.

With PROMETHEUS_MULTIPROC_DIR set before this module is imported, prometheus_client keeps the
values in files there and any worker can show the sum of all. Gauges, which no request sets, are
written at once; what is counted, when `flush` is called (`series.py`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import product
from time import perf_counter

from prometheus_client import REGISTRY, CollectorRegistry, Gauge, generate_latest, multiprocess

from narseal import __version__
from narseal.runtime.tasks import BackgroundTasks
from narseal.telemetry.series import counter, counters, flush, histogram, histograms

#: Of what `render` returns.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Values of `reason` of narseal_rejected_total.
REASONS = (
    "absolute-url",
    "bad-bundle",
    "bad-identity",
    "ca-mismatch",
    "conflict",
    "content-mismatch",
    "corrupt",
    "escapes-upstream",
    "malformed",
    "malformed-nar",
    "nar-size",
    "policy",
    "refused-source",
    "revoked",
    "signer-refused",
    "too-large",
    "truncated",
    "unsigned",
    "unsupported-compression",
    "wrong-path",
    "wrong-compression",
    "wrong-references",
)
ROUTES = (
    "narinfo",
    "nar",
    "nix-cache-info",
    "ls",
    "log",
    "debuginfo",
    "realisations",
    "build-trace-v2",
    "signature",
    "attestations",
    "status-of",
    "keys",
    "other",
)
#: Values of `kind` of the verification and of the signing histograms.
VERIFICATIONS = ("nix", "content", "bundle", "rekor")
SIGNATURES = ("nix", "batch", "file")
#: Values of `kind` of narseal_storage_errors_total.
STORAGE_ERRORS = ("wrong-content", "unreadable", "lost", "gone")

_FLUSH = 0.5

_FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SLOW = (*_FAST, 5, 10, 30, 60, 120, 300)
_SIGNING = (*_FAST, 5, 10, 30)
_MILLISECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000)

requests = counters("narseal_requests_total", "Requests answered.", ["route", "code"])
request_seconds = histograms(
    "narseal_request_seconds",
    "From a request's head to the end of its answer.",
    ["route"],
    edges=_SLOW,
)
verify_seconds = histograms(
    "narseal_verify_seconds", "Verification of one object.", ["kind", "result"], edges=_SLOW
)
verify_ms = histograms(
    "sigstore_verify_ms",
    "Verification of one object, in milliseconds.",
    ["kind"],
    edges=_MILLISECONDS,
)
sign_seconds = histograms(
    "narseal_sign_seconds",
    "Making of one signature: nix, batch (a statement), file.",
    ["kind", "result"],
    edges=_SIGNING,
)
upstream_seconds = histograms(
    "narseal_upstream_seconds",
    "One question to an upstream.",
    ["upstream", "result"],
    edges=_SLOW,
)
nar_bytes = counters("narseal_nar_bytes_total", "NAR bytes sent to clients.", ["source"])
hot_hits = counter("narseal_hot_hits_total", "Narinfos answered from memory.")
flights_joined = counter("narseal_flights_joined_total", "Requests that joined a running one.")
rejected = counters("narseal_rejected_total", "Objects refused.", ["reason"])
corrected = counter(
    "narseal_corrected_total", "Upstream narinfos whose unsigned fields were wrong and corrected."
)
auth_failures = counter("narseal_auth_failures_total", "Requests with a token that is not good.")
tokens_file_errors = counter(
    "narseal_tokens_file_errors_total", "Looks at a tokens file that cannot be used."
)
prefetch_stopped = counter(
    "narseal_prefetch_stopped_total", "Paths whose references were not all brought in advance."
)
prefetched = counters("narseal_prefetched_total", "Narinfos and NARs brought in advance.", ["kind"])
prefetch_used = counters(
    "narseal_prefetch_used_total", "Those of them that a client asked for then.", ["kind"]
)
slow_uploads = counter("narseal_slow_uploads_total", "Uploads that stalled, or only dripped.")
attest_queue = Gauge(
    "narseal_attest_queue",
    "Store paths that wait for their Sigstore signature.",
    multiprocess_mode="mostrecent",
)
attest_oldest = Gauge(
    "narseal_attest_oldest_seconds",
    "How long the first of them waits; 0: none does.",
    multiprocess_mode="mostrecent",
)
attest_batch_subjects = histogram(
    "narseal_attest_batch_subjects",
    "Digests in one signed statement.",
    edges=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
)
attest_failures = counter(
    "narseal_attest_failures_total", "Batches that could not be signed and are tried again."
)
worker_restarts = counter("narseal_worker_restarts_total", "Workers that died and were restarted.")
resign_waiting = Gauge(
    "narseal_resign_waiting",
    "Paths that lack the signature of an active key.",
    multiprocess_mode="mostrecent",
)
resigned = counters(
    "narseal_resigned_total", "Paths that got signatures of keys that came later.", ["result"]
)
reload_successful = Gauge(
    "narseal_config_last_reload_successful",
    "1, or 0 while the last change of the configuration was refused.",
    multiprocess_mode="mostrecent",
)
reload_seconds = Gauge(
    "narseal_config_last_reload_success_timestamp_seconds",
    "Unix time of the configuration that is in force.",
    multiprocess_mode="mostrecent",
)
key_not_after = Gauge(
    "narseal_key_not_after_seconds",
    "Unix time after which a key stops signing; 0: never.",
    ["key"],
    multiprocess_mode="max",
)
storage_bytes = Gauge(
    "narseal_storage_bytes", "Bytes of NARs in storage.", multiprocess_mode="mostrecent"
)
storage_errors = counters(
    "narseal_storage_errors_total", "Faults of storage that were lived through, or not.", ["kind"]
)
scrubbed = counters("narseal_scrubbed_total", "Stored NARs that were hashed again.", ["result"])
scrub_bytes = counter("narseal_scrub_bytes_total", "Bytes of NARs that were hashed again.")
index_present = Gauge(
    "narseal_index_present",
    "1, or 0 while the index is not the file that was opened at the start.",
    multiprocess_mode="mostrecent",
)
storage_present = Gauge(
    "narseal_storage_present",
    "1, or 0 while the storage folder is not there, or not the index's.",
    multiprocess_mode="mostrecent",
)
build_info = Gauge(
    "narseal_build_info", "Always 1; the version is a label.", ["version"], multiprocess_mode="max"
)


def prepare(upstreams: Sequence[str]) -> None:
    """Make every known series exist, so that a rate over the first event is right."""
    for route in ROUTES:
        requests.labels(route, "200")
        request_seconds.labels(route)
    for reason in REASONS:
        rejected.labels(reason)
    for kind, result in product(VERIFICATIONS, ("good", "bad")):
        verify_ms.labels(kind)
        verify_seconds.labels(kind, result)
    for kind, result in product(SIGNATURES, ("good", "bad")):
        sign_seconds.labels(kind, result)
    for source in ("storage", "memory", "upstream"):
        nar_bytes.labels(source)
    for upstream, result in product(upstreams, ("found", "absent", "trouble")):
        upstream_seconds.labels(upstream, result)
    for kind in STORAGE_ERRORS:
        storage_errors.labels(kind)
    for result in ("good", "bad"):
        scrubbed.labels(result)
    index_present.set(1)
    storage_present.set(1)
    for result in ("signed", "kept-back", "refused"):
        resigned.labels(result)
    build_info.labels(__version__).set(1)


def verifying(kind: str) -> _Measured:
    """Measure a verification; an exception is a bad result."""
    return _Measured(observe_verification, kind)


def signing(kind: str) -> _Measured:
    """Measure the making of a signature; an exception is a bad result."""
    return _Measured(_observe_signing, kind)


class _Measured:
    def __init__(self, observe: Callable[[str, str, float], None], kind: str) -> None:
        self._observe = observe
        self._kind = kind

    def __enter__(self) -> None:
        self._start = perf_counter()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._observe(self._kind, "bad" if error else "good", perf_counter() - self._start)


def observe_verification(kind: str, result: str, seconds: float) -> None:
    """Count one verification of `seconds` into both of its histograms."""
    verify_seconds.labels(kind, result).observe(seconds)
    verify_ms.labels(kind).observe(seconds * 1000)


def _observe_signing(kind: str, result: str, seconds: float) -> None:
    sign_seconds.labels(kind, result).observe(seconds)


@asynccontextmanager
async def flushing() -> AsyncIterator[None]:
    """Flush twice a second, and once more at the end, however it ends."""

    async def flush_again() -> None:
        while True:
            await asyncio.sleep(_FLUSH)
            flush()

    tasks = BackgroundTasks()
    tasks.start(flush_again(), "flush")
    try:
        yield
    finally:
        await tasks.close(wait=0)
        flush()


def render() -> bytes:
    """The exposition text of all workers; what this one counted is in it."""
    flush()
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)

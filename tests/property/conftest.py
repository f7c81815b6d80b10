"""Property tests go over the same lines thousands of times: tracing them would cost minutes."""

from __future__ import annotations

from collections.abc import Iterator

import coverage
import pytest


@pytest.fixture(scope="package", autouse=True)
def _not_measured() -> Iterator[None]:
    running = coverage.Coverage.current()
    if running is None:
        yield
        return
    running.stop()
    yield
    running.start()

"""Counters and histograms that are counted in this process and written for all to see now and then.

prometheus_client's own series, right across workers, ask for the process id, take a lock and write
into a mapped file each time: 38 times for one cold NAR. Here every thread adds to numbers of its
own, so that counting takes no lock and loses nothing; `flush` adds to prometheus_client's series
what came since it was last called.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from threading import Lock, get_ident
from typing import Generic, Protocol, TypeVar

import prometheus_client


class _Cell(Protocol):
    def inc(self, amount: float) -> None:
        """Add to what all workers show."""


class _Series:
    """What was counted, by thread; beside it what of it is written."""

    def __init__(self, cells: Sequence[_Cell]) -> None:
        self.cells = cells
        self._numbers: defaultdict[int, list[float]] = defaultdict(lambda: [0.0] * len(cells))
        self._written = [0.0] * len(cells)
        _all.append(self)

    def write(self) -> None:
        """Add what is new to the cells; one caller at a time."""
        totals = [sum(numbers) for numbers in zip(*self._numbers.copy().values(), strict=True)]
        for index, total in enumerate(totals):
            if more := total - self._written[index]:
                self.cells[index].inc(more)
                self._written[index] = total


_all: list[_Series] = []
_writing = Lock()


class Counter(_Series):
    """One series of a counter."""

    def __init__(self, series: prometheus_client.Counter) -> None:
        super().__init__([series])

    def inc(self, amount: float = 1) -> None:
        """Count, in any thread."""
        self._numbers[get_ident()][0] += amount


class Histogram(_Series):
    """One series of a histogram with these edges.

    prometheus_client observes one value at a time; what gathered goes into its cells instead.
    """

    def __init__(self, series: prometheus_client.Histogram, edges: Sequence[float]) -> None:
        super().__init__([series._sum, *series._buckets])  # noqa: SLF001
        self.edges = (-math.inf, *edges, math.inf)  # each at the place of its cell

    def observe(self, value: float) -> None:
        """Count a value, in any thread."""
        numbers = self._numbers[get_ident()]
        numbers[0] += value
        numbers[bisect_left(self.edges, value)] += 1


class Answers(_Series):
    """What an answer from memory adds to three series, in one step: its way is that short."""

    def __init__(self, seconds: Histogram, count: Counter, amount: Counter) -> None:
        super().__init__([*count.cells, *amount.cells, *seconds.cells])
        self._edges = (-math.inf, -math.inf, *seconds.edges)

    def add(self, seconds: float, amount: float) -> None:
        """Count an answer, in any thread."""
        numbers = self._numbers[get_ident()]
        numbers[0] += 1
        numbers[1] += amount
        numbers[2] += seconds
        numbers[bisect_left(self._edges, seconds)] += 1


S = TypeVar("S", bound=_Series)


class Labelled(Generic[S]):
    """The series of one metric by the values of its labels."""

    def __init__(self, make: Callable[..., S]) -> None:
        #: The one with these values. Looked up without a lock; there at zero from the first call.
        self.labels = functools.cache(make)


def counter(name: str, text: str) -> Counter:
    """A counter without labels."""
    return Counter(prometheus_client.Counter(name, text))


def counters(name: str, text: str, labels: Sequence[str]) -> Labelled[Counter]:
    """A counter with labels."""
    metric = prometheus_client.Counter(name, text, labels)
    return Labelled(lambda *values: Counter(metric.labels(*values)))


def histogram(name: str, text: str, *, edges: Sequence[float]) -> Histogram:
    """A histogram without labels."""
    return Histogram(prometheus_client.Histogram(name, text, buckets=edges), edges)


def histograms(
    name: str, text: str, labels: Sequence[str], *, edges: Sequence[float]
) -> Labelled[Histogram]:
    """A histogram with labels."""
    metric = prometheus_client.Histogram(name, text, labels, buckets=edges)
    return Labelled(lambda *values: Histogram(metric.labels(*values), edges))


def flush() -> None:
    """Write what was counted until now, in whatever thread.

    Who forks calls it before: what is not written then, both would write.
    """
    with _writing:
        for series in _all:
            series.write()

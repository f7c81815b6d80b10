"""What is counted in the process arrives in prometheus_client as if it had counted itself."""

from __future__ import annotations

import threading

import prometheus_client

from narseal.telemetry import series

EDGES = (0.001, 0.01, 1)
VALUES = (0.0, 0.0005, 0.001, 0.0011, 0.01, 0.5, 1, 1.5, 1e9)


def samples(metric: prometheus_client.metrics.MetricWrapperBase) -> dict[str, float]:
    """By suffix and labels, without when the series was made."""
    return {
        f"{sample.name}{sample.labels}": sample.value
        for family in metric.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_a_histogram_has_what_the_library_would_have_observed() -> None:
    registry = prometheus_client.CollectorRegistry()
    theirs = prometheus_client.Histogram("x", "x", buckets=EDGES, registry=registry)
    written = prometheus_client.Histogram("x", "x", buckets=EDGES, registry=None)
    ours = series.Histogram(written, EDGES)
    for round_ in range(1, 4):
        for value in VALUES:
            theirs.observe(value)
            ours.observe(value)
        assert samples(written) != samples(theirs)
        series.flush()
        assert samples(written) == samples(theirs)
        series.flush()  # nothing new: nothing is written twice
        assert samples(written) == samples(theirs)
        assert samples(written)["x_count{}"] == round_ * len(VALUES)


def test_an_answer_from_memory_counts_in_three_series() -> None:
    seconds = prometheus_client.Histogram("s", "x", buckets=EDGES, registry=None)
    count = prometheus_client.Counter("c", "x", registry=None)
    amount = prometheus_client.Counter("a", "x", registry=None)
    timed = series.Histogram(seconds, EDGES)
    answers = series.Answers(timed, series.Counter(count), series.Counter(amount))
    expected = prometheus_client.Histogram("s", "x", buckets=EDGES, registry=None)
    for value in VALUES:
        answers.add(value, 7)
        expected.observe(value)
    timed.observe(0.5)  # beside it
    expected.observe(0.5)
    series.flush()
    assert samples(seconds) == samples(expected)
    assert samples(count) == {"c_total{}": len(VALUES)}
    assert samples(amount) == {"a_total{}": 7 * len(VALUES)}


def test_threads_that_count_at_the_same_time_lose_nothing_and_nothing_counts_twice() -> None:
    counted = prometheus_client.Counter("t", "x", registry=None)
    ours = series.Counter(counted)
    done = threading.Event()

    def count() -> None:
        for _ in range(20_000):
            ours.inc()

    def write() -> None:
        while not done.is_set():
            series.flush()

    counting = [threading.Thread(target=count) for _ in range(4)]
    writing = [threading.Thread(target=write) for _ in range(2)]
    for thread in (*writing, *counting):
        thread.start()
    for thread in counting:
        thread.join()
    done.set()
    for thread in writing:
        thread.join()
    series.flush()
    assert samples(counted) == {"t_total{}": 80_000}


def test_who_writes_while_another_does_waits() -> None:
    others: list[threading.Thread] = []

    class Slow(prometheus_client.Counter):
        """While the first one writes, there is a second one."""

        def inc(self, amount: float = 1, exemplar: dict[str, str] | None = None) -> None:
            if not others:
                others.append(threading.Thread(target=series.flush))
                others[0].start()
                others[0].join(0.2)
            super().inc(amount, exemplar)

    counted = Slow("w", "x", registry=None)
    series.Counter(counted).inc()
    series.flush()
    others[0].join()
    assert samples(counted) == {"w_total{}": 1}


def test_a_series_is_made_once() -> None:
    made: list[tuple[object, ...]] = []

    def make(*values: object) -> series.Counter:
        made.append(values)
        return series.Counter(prometheus_client.Counter("m", "x", registry=None))

    metric = series.Labelled(make)
    assert metric.labels("a") is metric.labels("a")
    assert metric.labels("a") is not metric.labels("b")
    assert made == [("a",), ("b",)]

"""RayMetrics: a replica's metrics through `ray.util.metrics`, so that Ray's own Prometheus endpoint has them.

Names are those of `/metrics` with `ray_` in front, which Ray adds. Each number is one of Ray's gauges, counters and
buckets too: Ray's histograms take one observation at a time and keep the middle of its bucket, while these give the
exact cumulative counts, for which `rate` and `histogram_quantile` work as they do for `/metrics`. The series of a
replica that has gone disappear after two of Ray's report intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from ray.util.metrics import Gauge

from max_ray.scheduler import Histogram
from max_ray.serve.api.metric_families import FAMILIES, REPLICA_LABELS, Family
from max_ray.serve.api.metrics import MetricsSnapshot

ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""The environment of a process that publishes. Ray exports every series each ten seconds, in threads of its own: with
an arena for each thread the C library keeps about 4 KiB of each series each time, without end."""
REFRESH_TURNS = 5
"""Ray forgets a series that is not set for two report intervals (20 s): all are set once in so many turns."""
_Key = tuple[str, str, tuple[str, ...]]
_Number = tuple[_Key, float]


class Settable(Protocol):
    """A gauge."""

    def set(self, value: float, tags: dict[str, str]) -> None:
        """Sets the series with these tags."""


class RayMetrics:
    """To be called once a second, away from the token path.

    Args:
        new_gauge: Makes a gauge of a name, a help and the names of tags.
    """

    def __init__(self, new_gauge: Callable[[str, str, tuple[str, ...]], Settable] = Gauge) -> None:
        self._new_gauge = new_gauge
        self._gauges: dict[str, Settable] = {}
        self._series: dict[_Key, tuple[Settable, dict[str, str], int]] = {}
        self._values: dict[_Key, float] = {}
        self._turn = 0

    def publish(self, snapshot: MetricsSnapshot) -> None:
        """Sets what has changed since the last call, and of the rest one part in REFRESH_TURNS.

        Args:
            snapshot: Of this replica.
        """
        self._turn = (self._turn + 1) % REFRESH_TURNS
        for family in FAMILIES:
            for (name, le, values), number in _numbers(family, snapshot):
                key = (name, le, values)
                series = self._series.get(key)
                if series is None:
                    series = self._series[key] = self._new_series(family, key, snapshot)
                gauge, tags, turn = series
                if turn == self._turn or self._values.get(key) != number:
                    self._values[key] = number
                    gauge.set(number, tags)

    def _new_series(self, family: Family, key: _Key, snapshot: MetricsSnapshot) -> tuple[Settable, dict[str, str], int]:
        name, le, values = key
        names = (*REPLICA_LABELS, *family.labels, *(("le",) if le else ()))
        if name not in self._gauges:
            self._gauges[name] = self._new_gauge(name, family.text, names)
        texts = (snapshot.model_name, snapshot.replica, *values, *((le,) if le else ()))
        return self._gauges[name], dict(zip(names, texts, strict=True)), len(self._series) % REFRESH_TURNS


def _numbers(family: Family, snapshot: MetricsSnapshot) -> Iterator[_Number]:
    """Every number of a metric: (name, upper bound of a bucket or "", values of the family's labels), number."""
    for values, number in family.read(snapshot):
        if isinstance(number, Histogram):
            yield from _of_histogram(family.name, values, number)
        else:
            yield (family.name, "", values), number


def _of_histogram(name: str, values: tuple[str, ...], histogram: Histogram) -> Iterator[_Number]:
    below = 0
    for bound, count in zip(histogram.bounds, histogram.counts, strict=False):
        below += count
        yield (f"{name}_bucket", f"{bound:.10g}", values), below
    below += histogram.counts[-1]
    yield (f"{name}_bucket", "+Inf", values), below
    yield (f"{name}_count", "", values), below
    yield (f"{name}_sum", "", values), histogram.total

"""MetricsPage: `/metrics`, in Prometheus' text format 0.0.4, of all replicas together.

What stands before the number of a series, its name and labels, is made once and kept: a scrape formats numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from max_ray.scheduler import Histogram
from max_ray.serve.api.metric_families import FAMILIES, REPLICA_LABELS, Family
from max_ray.serve.api.metrics import MetricsSnapshot

_MAX_KEPT = 4096
"""Series. More are kept for a moment only: replicas come and go."""
_HEADERS = {
    family.name: f"# HELP {family.name} {family.text}\n# TYPE {family.name} {family.kind.value}\n"
    for family in FAMILIES
}
_Key = tuple[str, str, str, tuple[str, ...]]


class MetricsPage:
    """Renders snapshots. May be called from any thread, by one at a time."""

    def __init__(self) -> None:
        self._beginnings: dict[_Key, list[str]] = {}

    def render(self, snapshots: Sequence[MetricsSnapshot]) -> bytes:
        """The page.

        Args:
            snapshots: One a replica.
        """
        if len(self._beginnings) > _MAX_KEPT:
            self._beginnings.clear()
        return "".join(self._pieces(snapshots)).encode()

    def _pieces(self, snapshots: Sequence[MetricsSnapshot]) -> Iterator[str]:
        for family in FAMILIES:
            yield _HEADERS[family.name]
            for snapshot in snapshots:
                for values, number in family.read(snapshot):
                    key = (family.name, snapshot.model_name, snapshot.replica, values)
                    beginnings = self._beginnings.get(key)
                    if beginnings is None:
                        beginnings = self._beginnings[key] = _beginnings(family, key, number)
                    if isinstance(number, Histogram):
                        yield _histogram_lines(beginnings, number)
                    else:
                        yield f"{beginnings[0]}{number}\n"


def render_metrics(snapshots: Sequence[MetricsSnapshot]) -> bytes:
    """The page, rendered once.

    Args:
        snapshots: One a replica.
    """
    return MetricsPage().render(snapshots)


def _histogram_lines(beginnings: list[str], histogram: Histogram) -> str:
    below, lines = 0, []
    for beginning, count in zip(beginnings, histogram.counts, strict=False):
        below += count
        lines.append(f"{beginning}{below}\n")
    return f"{''.join(lines)}{beginnings[-2]}{below}\n{beginnings[-1]}{histogram.total}\n"


def _beginnings(family: Family, key: _Key, number: float | Histogram) -> list[str]:
    """Of the lines of one series: one line, or of a histogram those of its buckets, its count and its sum."""
    name, model_name, replica, values = key
    names = (*REPLICA_LABELS, *family.labels)
    labels = ",".join(
        f'{label}="{_escaped(value)}"' for label, value in zip(names, (model_name, replica, *values), strict=True)
    )
    if not isinstance(number, Histogram):
        return [f"{name}{{{labels}}} "]
    bounds = [*(f"{bound:.10g}" for bound in number.bounds), "+Inf"]
    buckets = [f'{name}_bucket{{{labels},le="{bound}"}} ' for bound in bounds]
    return [*buckets, f"{name}_count{{{labels}}} ", f"{name}_sum{{{labels}}} "]


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

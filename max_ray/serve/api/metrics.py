"""Metrics for Prometheus: counted by the routes, one snapshot a replica, exported for all replicas together.

A snapshot is plain picklable data, so that a replica can send it to the sibling that answers a scrape. Every series has
the labels `model_name` and `replica`: sums over replicas are exact, and a restarted replica is an ordinary counter
reset. The text format is `prometheus_client`'s.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from prometheus_client import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from max_ray.scheduler import SchedulerStats

FamilyT = TypeVar("FamilyT", CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily)
ScalarT = TypeVar("ScalarT", CounterMetricFamily, GaugeMetricFamily)

_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_REPLICA_LABELS = ("model_name", "replica")

# name -> (field of SchedulerStats, help). A request with n choices counts n times in these.
_GAUGES = {
    "queued_requests": ("queued", "Requests that wait for admission."),
    "running_requests": ("running", "Requests that hold KV blocks."),
    "oldest_queued_request_seconds": ("oldest_waiting_s", "Age of the request at the head of the queue; 0 if none."),
    "kv_blocks_used": ("num_used_blocks", "KV cache blocks that running requests hold."),
    "kv_blocks_capacity": ("num_blocks", "KV cache blocks in all."),
}
_COUNTERS = {
    "finished_requests_total": ("finished", "Requests that the model ended, or their length limit."),
    "cancelled_requests_total": ("cancelled", "Requests that their clients ended early."),
    "failed_requests_total": ("failed", "Requests that were queued and ended with an error."),
    "rejected_requests_total": ("rejected", "Requests refused because the queue was full."),
    "prefix_hit_tokens_total": (
        "prefix_hit_tokens",
        "Prompt tokens whose keys and values came from the prefix cache.",
    ),
    "prefix_cache_hits_total": ("prefix_cache_hits", "Prompt blocks found in the prefix cache."),
    "prefix_cache_misses_total": ("prefix_cache_misses", "Full prompt blocks looked up and not found."),
    "prefix_cache_evictions_total": ("prefix_cache_evictions", "Cached blocks reused for other tokens."),
    "scheduler_decisions_total": ("decisions", "Scheduling decisions: batches formed."),
    "steps_total": ("steps", "Model steps."),
    "runs_total": ("runs", "Runs of one or more steps sent to the workers."),
    "run_extensions_total": ("extensions", "Requests for more steps of a run in progress."),
    "run_interrupts_total": ("interrupts", "Runs ended early, for a waiting or a cancelled request."),
    "preemptions_total": ("preemptions", "Requests put back into the queue for want of blocks."),
    "worker_group_recoveries_total": ("recoveries", "Attempts to bring failed workers back."),
}


@dataclass(slots=True)
class Histogram:
    """Counts per bucket, cheap enough for every token; several tokens that came at once are one call.

    Args:
        bounds: Upper bounds of the buckets, inclusive.
        counts: Observations in each bucket; the last one is of everything above the bounds.
        total: Sum of all observed values.
    """

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Counts `value`, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def copy(self) -> Histogram:
        """A histogram that later observations do not change."""
        return Histogram(self.bounds, self.counts.copy(), self.total)

    @property
    def count(self) -> int:
        """Observations."""
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """An estimate, linear within a bucket, as Prometheus' `histogram_quantile`; the last bound at most.

        Args:
            share: Of the observations, from 0 to 1.

        Returns:
            The value; None without observations.
        """
        rank, below, lower = share * self.count, 0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if count and below + count >= rank:
                return lower + (bound - lower) * max(0.0, rank - below) / count
            below, lower = below + count, bound
        return lower if self.count else None

    def cumulative(self) -> list[tuple[str, float]]:
        """(label `le`, observations up to that bound) of each bucket."""
        below = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip([*(f"{bound:g}" for bound in self.bounds), "+Inf"], self.counts, strict=True):
            below += count
            buckets.append((bound, below))
        return buckets


@dataclass(frozen=True, slots=True)
class GroupView:
    """A replica's worker group.

    Args:
        group_id: Its name.
        epoch: Owners so far: replicas that had it, and rebuilds.
        num_workers: Ranks.
        device: What they compute on: "cpu" or "cuda".
    """

    group_id: str
    epoch: int
    num_workers: int
    device: str


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """One replica's numbers at one moment.

    Args:
        model_name: Value of the label `model_name`.
        replica: Value of the label `replica`.
        requests: HTTP requests by route and status.
        prompt_tokens: Prompt tokens of admitted requests.
        generated_tokens: Tokens generated.
        stats: What the scheduling loop has counted.
        histograms: By metric name, without labels of their own.
        durations: By route and class of status ("2xx").
        startup_phases: Seconds by name.
        group: The worker group.
        address: URL of the replica's HTTP server, where a front passes requests on to it.
    """

    model_name: str
    replica: str
    requests: Mapping[tuple[str, int], int]
    prompt_tokens: int
    generated_tokens: int
    stats: SchedulerStats
    histograms: Mapping[str, Histogram]
    durations: Mapping[tuple[str, str], Histogram]
    startup_phases: Mapping[str, float]
    group: GroupView | None = None
    address: str = ""


class Metrics:
    """The counters of one replica's routes. Every method is O(1) and touched by the event loop only.

    Args:
        model_name: The name that requests give.
        replica: Unique among the replicas of the application.
    """

    def __init__(self, model_name: str, replica: str) -> None:
        self.model_name = model_name
        self.replica = replica
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.time_to_first_token = Histogram(_TTFT_BUCKETS)
        self.inter_token_latency = Histogram(_ITL_BUCKETS)
        self._requests: Counter[tuple[str, int]] = Counter()
        self._durations: dict[tuple[str, str], Histogram] = {}

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Counts an HTTP request.

        Args:
            route: The route's template, not what the client asked for: each makes series of its own.
            status: HTTP status of the answer.
            seconds: From the request's arrival to the end of the answer.
        """
        self._requests[route, status] += 1
        group = (route, f"{status // 100}xx")
        if group not in self._durations:
            self._durations[group] = Histogram(_DURATION_BUCKETS)
        self._durations[group].observe(seconds)

    def snapshot(
        self,
        stats: SchedulerStats,
        startup_phases: Mapping[str, float] | None = None,
        group: GroupView | None = None,
    ) -> MetricsSnapshot:
        """The numbers as of now.

        Args:
            stats: A snapshot of the scheduling loop's.
            startup_phases: Seconds of each phase of the start, by name.
            group: The worker group.
        """
        return MetricsSnapshot(
            model_name=self.model_name,
            replica=self.replica,
            requests=dict(self._requests),
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            stats=stats,
            histograms={
                "time_to_first_token_seconds": self.time_to_first_token.copy(),
                "inter_token_latency_seconds": self.inter_token_latency.copy(),
            },
            durations={group: histogram.copy() for group, histogram in self._durations.items()},
            startup_phases=dict(startup_phases or {}),
            group=group,
        )


class SnapshotCollector(Collector):
    """Metric families of all replicas, for `prometheus_client`.

    Args:
        snapshots: One a replica.
    """

    def __init__(self, snapshots: Sequence[MetricsSnapshot]) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        """The families, each with the samples of every replica."""
        yield self._requests()
        for name, (attribute, text) in _GAUGES.items():
            yield self._of_stats(_family(GaugeMetricFamily, name, text), attribute)
        yield self._histogram("time_to_first_token_seconds", "From the request's arrival to its first token.")
        yield self._histogram("inter_token_latency_seconds", "Between two tokens of one stream.")
        yield self._durations()
        yield from self._tokens()
        for name, (attribute, text) in _COUNTERS.items():
            yield self._of_stats(_family(CounterMetricFamily, name, text), attribute)
        yield self._startup_phases()

    def _of_stats(self, family: ScalarT, attribute: str) -> ScalarT:
        for snapshot in self._snapshots:
            family.add_metric(_labels(snapshot), getattr(snapshot.stats, attribute))
        return family

    def _requests(self) -> Metric:
        text = "Requests to /v1 by route and HTTP status (499: the client hung up)."
        family = _family(CounterMetricFamily, "requests_total", text, "route", "status")
        for snapshot in self._snapshots:
            for (route, status), count in sorted(snapshot.requests.items()):
                family.add_metric([*_labels(snapshot), route, str(status)], count)
        return family

    def _tokens(self) -> Iterator[Metric]:
        prompt = _family(CounterMetricFamily, "prompt_tokens_total", "Prompt tokens of admitted requests.")
        generated = _family(CounterMetricFamily, "generated_tokens_total", "Tokens generated.")
        for snapshot in self._snapshots:
            prompt.add_metric(_labels(snapshot), snapshot.prompt_tokens)
            generated.add_metric(_labels(snapshot), snapshot.generated_tokens)
        yield from (prompt, generated)

    def _histogram(self, name: str, text: str) -> Metric:
        family = _family(HistogramMetricFamily, name, text)
        for snapshot in self._snapshots:
            histogram = snapshot.histograms[name]
            family.add_metric(_labels(snapshot), histogram.cumulative(), histogram.total)
        return family

    def _durations(self) -> Metric:
        text = "From arrival to the end of the answer, by route and class of status."
        family = _family(HistogramMetricFamily, "request_duration_seconds", text, "route", "status")
        for snapshot in self._snapshots:
            for group, histogram in sorted(snapshot.durations.items()):
                family.add_metric([*_labels(snapshot), *group], histogram.cumulative(), histogram.total)
        return family

    def _startup_phases(self) -> Metric:
        text = "How long each phase of the start of the worker group took (rank 0)."
        family = _family(GaugeMetricFamily, "startup_phase_seconds", text, "phase")
        for snapshot in self._snapshots:
            for phase, seconds in snapshot.startup_phases.items():
                family.add_metric([*_labels(snapshot), phase], seconds)
        return family


def render_metrics(snapshots: Sequence[MetricsSnapshot]) -> bytes:
    """Prometheus text exposition format, version 0.0.4, of all replicas."""
    return generate_latest(SnapshotCollector(snapshots))


def _family(kind: type[FamilyT], name: str, text: str, *labels: str) -> FamilyT:
    return kind(f"max_ray_{name}", text, labels=[*_REPLICA_LABELS, *labels])


def _labels(snapshot: MetricsSnapshot) -> list[str]:
    return [snapshot.model_name, snapshot.replica]

"""Numbers for Prometheus: counted by the routes, snapshot per replica, rendered for all replicas together.

A snapshot is plain picklable data, so that replicas can send theirs to wherever a scrape lands. Every series carries
`model_name` and `replica`: sums over replicas are exact, and a restarted replica is an ordinary counter reset.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

# name -> (type, help), in the order of the page. Durations are in seconds.
_FAMILIES = {
    "requests_total": ("counter", "Requests to /v1 by route and HTTP status (499: the client hung up)."),
    "queued_requests": ("gauge", "Requests that wait for admission."),
    "running_requests": ("gauge", "Requests that hold KV blocks."),
    "time_to_first_token_seconds": ("histogram", "From the request's arrival to its first token."),
    "inter_token_latency_seconds": ("histogram", "Between two tokens of one stream."),
    "request_duration_seconds": ("histogram", "From arrival to the end of the answer, by route and class of status."),
    "prompt_tokens_total": ("counter", "Prompt tokens of admitted requests."),
    "generated_tokens_total": ("counter", "Tokens generated."),
    "prefix_hit_tokens_total": ("counter", "Prompt tokens whose keys and values came from the prefix cache."),
    "kv_blocks_used": ("gauge", "KV cache blocks that running requests hold."),
    "kv_blocks_capacity": ("gauge", "KV cache blocks in all."),
    "steps_total": ("counter", "Model steps."),
    "runs_total": ("counter", "Runs of one or more steps sent to the workers."),
    "preemptions_total": ("counter", "Requests put back into the queue for want of blocks."),
    "startup_phase_seconds": ("gauge", "How long each phase of the start of the worker group took (rank 0)."),
}


@dataclass(slots=True)
class Histogram:
    """Counts per bucket; `bounds` are upper bounds, inclusive, and the last count is of everything above."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def copy(self) -> Histogram:
        return Histogram(self.bounds, self.counts.copy(), self.total)


@dataclass(frozen=True, slots=True)
class LoopNumbers:
    """What the generation loop knows; counters since its start, blocks as of now."""

    queued: int = 0
    running: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_hit_tokens: int = 0
    steps: int = 0
    runs: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """One replica's numbers at one moment: `values` and `histograms` hold unlabelled series by family name, `requests`
    the counts by route and status, `durations` histograms by route and class of status ("2xx")."""

    model_name: str
    replica: str
    requests: Mapping[tuple[str, int], int]
    values: Mapping[str, float]
    histograms: Mapping[str, Histogram]
    durations: Mapping[tuple[str, str], Histogram] = field(default_factory=dict)
    startup_phases: Mapping[str, float] = field(default_factory=dict)


class Metrics:
    """The counters of one replica's routes. Every method is O(1) and touched by the event loop only."""

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
        """`route`: its template, not what the client asked for: each makes series of its own."""
        self._requests[route, status] += 1
        group = (route, f"{status // 100}xx")
        if group not in self._durations:
            self._durations[group] = Histogram(_DURATION_BUCKETS)
        self._durations[group].observe(seconds)

    def snapshot(self, loop: LoopNumbers, startup_phases: Mapping[str, float] | None = None) -> MetricsSnapshot:
        """startup_phases: seconds by name."""
        return MetricsSnapshot(
            model_name=self.model_name,
            replica=self.replica,
            requests=dict(self._requests),
            values={
                "queued_requests": loop.queued,
                "running_requests": loop.running,
                "prompt_tokens_total": self.prompt_tokens,
                "generated_tokens_total": self.generated_tokens,
                "prefix_hit_tokens_total": loop.prefix_hit_tokens,
                "kv_blocks_used": loop.kv_blocks_used,
                "kv_blocks_capacity": loop.kv_blocks_total,
                "steps_total": loop.steps,
                "runs_total": loop.runs,
                "preemptions_total": loop.preemptions,
            },
            histograms={
                "time_to_first_token_seconds": self.time_to_first_token.copy(),
                "inter_token_latency_seconds": self.inter_token_latency.copy(),
            },
            durations={group: histogram.copy() for group, histogram in self._durations.items()},
            startup_phases=dict(startup_phases or {}),
        )


def render_metrics(snapshots: Sequence[MetricsSnapshot]) -> str:
    """Prometheus text exposition format, version 0.0.4, of all replicas."""
    lines: list[str] = []
    for family, (kind, text) in _FAMILIES.items():
        name = f"max_ray_{family}"
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        for snapshot in snapshots:
            lines += _samples(name, family, snapshot)
    return "\n".join(lines) + "\n"


def _samples(name: str, family: str, snapshot: MetricsSnapshot) -> Iterable[str]:
    labels = {"model_name": snapshot.model_name, "replica": snapshot.replica}
    if family == "requests_total":
        for (route, status), count in sorted(snapshot.requests.items()):
            yield _line(name, {**labels, "route": route, "status": str(status)}, count)
    elif family == "request_duration_seconds":
        for (route, group), histogram in sorted(snapshot.durations.items()):
            yield from _histogram_samples(name, {**labels, "route": route, "status": group}, histogram)
    elif family == "startup_phase_seconds":
        for phase, seconds in snapshot.startup_phases.items():
            yield _line(name, {**labels, "phase": phase}, seconds)
    elif family in snapshot.histograms:
        yield from _histogram_samples(name, labels, snapshot.histograms[family])
    else:
        yield _line(name, labels, snapshot.values[family])


def _histogram_samples(name: str, labels: dict[str, str], histogram: Histogram) -> Iterable[str]:
    below = 0
    for bound, count in zip([*histogram.bounds, float("inf")], histogram.counts, strict=True):
        below += count
        yield _line(f"{name}_bucket", {**labels, "le": "+Inf" if bound == float("inf") else f"{bound:g}"}, below)
    yield _line(f"{name}_sum", labels, histogram.total)
    yield _line(f"{name}_count", labels, below)


def _line(name: str, labels: Mapping[str, str], value: float) -> str:
    inside = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
    return f"{name}{{{inside}}} {value}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

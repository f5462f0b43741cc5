"""Metrics: counted by the routes, one snapshot a replica.

A snapshot is plain picklable data, so that a replica can send it to the sibling that answers a scrape.
`metric_families` says what of it is exported under which name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from max_ray.scheduler import Histogram, SchedulerStats

_TTFT_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ITL_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_DURATION_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_PHASE_BOUNDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_BOUNDS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
TEXT_ROUTES = ("/v1/chat/completions", "/v1/completions")
"""Routes whose series a model that generates text has from the start."""
PYTHON_HANDLE = "python"
"""The label `route` of requests that came through a Python handle."""


@dataclass(frozen=True, slots=True)
class FinishedChoice:
    """One choice of a request that has ended. A time is in seconds; None: the choice did not get so far.

    Args:
        finish_reason: "stop", "length", "tool_calls" or the like; "abort": it was cancelled or failed.
        prompt_tokens: Tokens of its prompt.
        cached_tokens: Those of them that were found in the prefix cache.
        generated_tokens: Tokens of its answer.
        preemptions: How often its blocks were taken back.
        queue_s: From its submission to its first KV blocks.
        prefill_s: From there to its first token.
        decode_s: From there to its last token.
        total_s: From the arrival of the request to its last token.
    """

    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None
    total_s: float | None


@dataclass(slots=True)
class RouteMetrics:
    """What is counted of the choices of one route. The times are those of FinishedChoice.

    Attributes:
        time_to_first_token: Seconds from the request's arrival to the first token.
        inter_token_latency: Seconds between two tokens.
        total: Seconds from the arrival to the last token.
        queue: Seconds in the queue.
        prefill: Seconds from the first KV blocks to the first token.
        decode: Seconds from the first to the last token.
        per_token: Seconds of decoding, by the tokens after the first one; one number a choice.
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Tokens of the prompt that were found in the prefix cache.
        generated_tokens: Tokens of the answer.
        finished: Choices by the reason of their end.
        preemptions: How often blocks were taken back.
    """

    time_to_first_token: Histogram = field(default_factory=lambda: Histogram(_TTFT_BOUNDS))
    inter_token_latency: Histogram = field(default_factory=lambda: Histogram(_ITL_BOUNDS))
    total: Histogram = field(default_factory=lambda: Histogram(_DURATION_BOUNDS))
    queue: Histogram = field(default_factory=lambda: Histogram(_PHASE_BOUNDS))
    prefill: Histogram = field(default_factory=lambda: Histogram(_PHASE_BOUNDS))
    decode: Histogram = field(default_factory=lambda: Histogram(_PHASE_BOUNDS))
    per_token: Histogram = field(default_factory=lambda: Histogram(_ITL_BOUNDS))
    prompt_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKEN_BOUNDS))
    cached_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKEN_BOUNDS))
    generated_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKEN_BOUNDS))
    finished: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0

    def finish(self, choice: FinishedChoice) -> None:
        """Counts a choice that has ended."""
        self.finished[choice.finish_reason] += 1
        self.preemptions += choice.preemptions
        self.prompt_tokens.observe(choice.prompt_tokens)
        self.cached_tokens.observe(choice.cached_tokens)
        self.generated_tokens.observe(choice.generated_tokens)
        times = (
            (self.queue, choice.queue_s),
            (self.prefill, choice.prefill_s),
            (self.decode, choice.decode_s),
            (self.total, choice.total_s),
        )
        for histogram, seconds in times:
            if seconds is not None:
                histogram.observe(seconds)
        if choice.decode_s is not None and choice.generated_tokens > 1:
            self.per_token.observe(choice.decode_s / (choice.generated_tokens - 1))

    def copy(self) -> RouteMetrics:
        """Numbers that later observations do not change."""
        return RouteMetrics(
            time_to_first_token=self.time_to_first_token.copy(),
            inter_token_latency=self.inter_token_latency.copy(),
            total=self.total.copy(),
            queue=self.queue.copy(),
            prefill=self.prefill.copy(),
            decode=self.decode.copy(),
            per_token=self.per_token.copy(),
            prompt_tokens=self.prompt_tokens.copy(),
            cached_tokens=self.cached_tokens.copy(),
            generated_tokens=self.generated_tokens.copy(),
            finished=Counter(self.finished),
            preemptions=self.preemptions,
        )


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
        routes: What was counted of the choices of each route that generates text.
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
    routes: Mapping[str, RouteMetrics]
    durations: Mapping[tuple[str, str], Histogram]
    startup_phases: Mapping[str, float]
    group: GroupView | None = None
    address: str = ""


class Metrics:
    """The counters of one replica's routes. Every method is O(1) and touched by the event loop only.

    Args:
        model_name: The name that requests give.
        replica: Unique among the replicas of the application.
        routes: Routes whose series exist from the start, at zero: `rate()` misses the first request of a new series.
    """

    def __init__(self, model_name: str, replica: str, routes: Sequence[str] = ()) -> None:
        self.model_name = model_name
        self.replica = replica
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self._routes = {route: RouteMetrics() for route in routes}
        self._requests: Counter[tuple[str, int]] = Counter()
        self._durations: dict[tuple[str, str], Histogram] = {}

    def of_route(self, route: str) -> RouteMetrics:
        """The counters of the choices of a route.

        Args:
            route: The route's template, not what the client asked for: each makes series of its own.
        """
        found = self._routes.get(route)
        if found is None:
            found = self._routes[route] = RouteMetrics()
        return found

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
            self._durations[group] = Histogram(_DURATION_BOUNDS)
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
            routes={route: counts.copy() for route, counts in self._routes.items()},
            durations={group: histogram.copy() for group, histogram in self._durations.items()},
            startup_phases=dict(startup_phases or {}),
            group=group,
        )


def merged(histograms: Iterable[Histogram]) -> Histogram | None:
    """The sum of histograms with the same bounds; None of none."""
    total: Histogram | None = None
    for histogram in histograms:
        if total is None:
            total = histogram.copy()
            continue
        total.counts = [a + b for a, b in zip(total.counts, histogram.counts, strict=True)]
        total.total += histogram.total
    return total

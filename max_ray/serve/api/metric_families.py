"""The exported metrics: name, type, help and labels of each, and where its numbers stand in a snapshot.

Names follow vLLM's where both have the same number, behind `max_ray_` instead of `vllm:`. Every series has the labels
`model_name` and `replica`: sums over replicas are exact, and a restarted replica is an ordinary counter reset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from max_ray.scheduler import Histogram
from max_ray.serve.api.metrics import MetricsSnapshot, RouteMetrics

PREFIX = "max_ray_"
REPLICA_LABELS = ("model_name", "replica")
Value = float | Histogram
Read = Callable[[MetricsSnapshot], Iterable[tuple[tuple[str, ...], Value]]]


class Kind(Enum):
    """Prometheus' type of a metric."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Family:
    """One metric.

    Args:
        name: With the prefix. Of a counter it ends in `_total`.
        kind: Its type.
        text: Its help, a sentence.
        labels: Names of its labels beside REPLICA_LABELS.
        read: Its series in a snapshot: values of `labels`, and the number.
    """

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...]
    read: Read


def _stat(name: str, kind: Kind, attribute: str, text: str) -> Family:
    def read(snapshot: MetricsSnapshot) -> Iterable[tuple[tuple[str, ...], Value]]:
        return (((), getattr(snapshot.stats, attribute)),)

    return Family(PREFIX + name, kind, text, (), read)


def _of_routes(name: str, kind: Kind, attribute: str, text: str) -> Family:
    def read(snapshot: MetricsSnapshot) -> Iterable[tuple[tuple[str, ...], Value]]:
        return [((route,), getattr(counts, attribute)) for route, counts in sorted(snapshot.routes.items())]

    return Family(PREFIX + name, kind, text, ("route",), read)


def _finished(snapshot: MetricsSnapshot) -> Iterable[tuple[tuple[str, ...], Value]]:
    def of_route(route: str, counts: RouteMetrics) -> Iterable[tuple[tuple[str, ...], Value]]:
        return [((route, reason), count) for reason, count in sorted(counts.finished.items())]

    return [series for route, counts in sorted(snapshot.routes.items()) for series in of_route(route, counts)]


# (name, field of SchedulerStats, help). A request with n choices counts n times in these.
_GAUGES = (
    ("queued_requests", "queued", "Requests that wait for admission."),
    ("running_requests", "running", "Requests that hold KV blocks."),
    ("oldest_queued_request_seconds", "oldest_waiting_s", "Age of the request at the head of the queue; 0 if none."),
    ("kv_blocks_used", "num_used_blocks", "KV cache blocks that running requests hold."),
    ("kv_blocks_capacity", "num_blocks", "KV cache blocks in all."),
)
_COUNTERS = (
    ("finished_requests_total", "finished", "Requests that the model ended, or their length limit."),
    ("cancelled_requests_total", "cancelled", "Requests that their clients ended early."),
    ("failed_requests_total", "failed", "Requests that were queued and ended with an error."),
    ("rejected_requests_total", "rejected", "Requests refused because the queue was full."),
    (
        "prefix_hit_tokens_total",
        "prefix_hit_tokens",
        "Prompt tokens whose keys and values came from the prefix cache.",
    ),
    ("prefix_cache_hits_total", "prefix_cache_hits", "Prompt blocks found in the prefix cache."),
    ("prefix_cache_misses_total", "prefix_cache_misses", "Full prompt blocks looked up and not found."),
    ("prefix_cache_evictions_total", "prefix_cache_evictions", "Cached blocks reused for other tokens."),
    ("scheduler_decisions_total", "decisions", "Scheduling decisions: batches formed."),
    ("steps_total", "steps", "Model steps."),
    ("runs_total", "runs", "Runs of one or more steps sent to the workers."),
    ("run_extensions_total", "extensions", "Requests for more steps of a run in progress."),
    ("run_interrupts_total", "interrupts", "Runs ended early, for a waiting or a cancelled request."),
    ("preemptions_total", "preemptions", "Requests put back into the queue for want of blocks."),
    ("worker_group_recoveries_total", "recoveries", "Attempts to bring failed workers back."),
)
# (name, field of RouteMetrics, help). Each choice of a request counts by itself.
_ROUTE_HISTOGRAMS = (
    ("time_to_first_token_seconds", "time_to_first_token", "From the request's arrival to its first token."),
    ("inter_token_latency_seconds", "inter_token_latency", "Between two tokens of one stream."),
    ("e2e_request_latency_seconds", "total", "From the request's arrival to its last token."),
    ("request_queue_time_seconds", "queue", "From the submission to the first KV blocks."),
    ("request_prefill_time_seconds", "prefill", "From the first KV blocks to the first token."),
    ("request_decode_time_seconds", "decode", "From the first token to the last one."),
    ("request_time_per_output_token_seconds", "per_token", "Decode time by token after the first one, of a request."),
    ("request_prompt_tokens", "prompt_tokens", "Tokens of a prompt."),
    ("request_cached_tokens", "cached_tokens", "Tokens of a prompt that were found in the prefix cache."),
    ("request_generation_tokens", "generated_tokens", "Tokens of an answer."),
)

FAMILIES = (
    Family(
        f"{PREFIX}requests_total",
        Kind.COUNTER,
        "Requests to /v1 by route and HTTP status (499: the client hung up).",
        ("route", "status"),
        lambda s: [((route, str(status)), count) for (route, status), count in sorted(s.requests.items())],
    ),
    *(_stat(name, Kind.GAUGE, attribute, text) for name, attribute, text in _GAUGES),
    *(_of_routes(name, Kind.HISTOGRAM, attribute, text) for name, attribute, text in _ROUTE_HISTOGRAMS),
    Family(
        f"{PREFIX}request_duration_seconds",
        Kind.HISTOGRAM,
        "From arrival to the end of the answer, by route and class of status.",
        ("route", "status"),
        lambda s: sorted(s.durations.items()),
    ),
    _stat("batch_size", Kind.HISTOGRAM, "batch_size", "Requests that gained tokens in a model step."),
    Family(
        f"{PREFIX}prompt_tokens_total",
        Kind.COUNTER,
        "Prompt tokens of admitted requests.",
        (),
        lambda s: [((), s.prompt_tokens)],
    ),
    Family(
        f"{PREFIX}generated_tokens_total", Kind.COUNTER, "Tokens generated.", (), lambda s: [((), s.generated_tokens)]
    ),
    *(_stat(name, Kind.COUNTER, attribute, text) for name, attribute, text in _COUNTERS),
    Family(
        f"{PREFIX}request_success_total",
        Kind.COUNTER,
        "Choices that ended, by the reason (abort: cancelled or failed).",
        ("route", "finished_reason"),
        _finished,
    ),
    _of_routes(
        "request_preemptions_total", Kind.COUNTER, "preemptions", "How often requests of a route were preempted."
    ),
    Family(
        f"{PREFIX}startup_phase_seconds",
        Kind.GAUGE,
        "How long each phase of the start of the worker group took (rank 0).",
        ("phase",),
        lambda s: [((phase,), seconds) for phase, seconds in s.startup_phases.items()],
    ),
)

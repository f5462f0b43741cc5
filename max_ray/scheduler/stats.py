"""Counters of a loop, for metrics, and the rate of completions, for the answer to a full queue."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields

from max_ray.scheduler.histogram import Histogram

_MAX_RETRY_AFTER_S = 60.0
_BATCH_SIZE_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def _batch_sizes() -> Histogram:
    return Histogram(_BATCH_SIZE_BOUNDS)


@dataclass(slots=True)
class SchedulerStats:
    """Present state (the first six), and counts since the loop was made.

    Attributes:
        queued: Requests that wait.
        running: Requests that hold blocks.
        oldest_waiting_s: Age of the oldest request that waits; 0 if none does.
        num_used_blocks: KV blocks that requests held after the last exchange.
        num_blocks: KV blocks of the cache.
        healthy: Whether the workers are well.
        prompt_tokens: Prompt tokens of admitted requests, each request once.
        prefix_hit_tokens: Those of them that were found in the prefix cache.
        prefix_cache_hits: Blocks found in the prefix cache, as the KV manager counts them since it was made.
        prefix_cache_misses: Blocks looked up and not found.
        prefix_cache_evictions: Cached blocks that were given new contents.
        generated_tokens: Tokens delivered.
        finished: Requests that the model or a limit ended.
        cancelled: Requests that their client ended.
        failed: Requests that ended with an error.
        rejected: Requests that found the queue full.
        decisions: Exchanges with the KV manager that scheduled a run.
        runs: Runs sent to the workers.
        extensions: Exchanges that asked for more steps of a run in progress.
        steps: Forward passes whose outputs arrived.
        interrupts: Runs that were ended early.
        preemptions: Requests whose blocks were taken back.
        recoveries: Attempts to bring the workers back.
        batch_size: Requests, or texts to embed, of each step.
    """

    queued: int = 0
    running: int = 0
    oldest_waiting_s: float = 0.0
    num_used_blocks: int = 0
    num_blocks: int = 0
    healthy: bool = True
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_cache_hits: int = 0
    prefix_cache_misses: int = 0
    prefix_cache_evictions: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    rejected: int = 0
    decisions: int = 0
    runs: int = 0
    extensions: int = 0
    steps: int = 0
    interrupts: int = 0
    preemptions: int = 0
    recoveries: int = 0
    batch_size: Histogram = field(default_factory=_batch_sizes)

    def counts(self) -> dict[str, float]:
        """Every number by its name; of the histogram nothing."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "batch_size"}


class CompletionRate:
    """How fast requests ended lately.

    Args:
        window: Completions to look at.
    """

    def __init__(self, window: int = 32) -> None:
        self._ends: deque[float] = deque(maxlen=window)

    def note(self, now: float) -> None:
        """A request ended at `now` (monotonic seconds)."""
        self._ends.append(now)

    def retry_after(self, num_waiting: int, now: float) -> float:
        """Time in which `num_waiting` requests leave the queue at the recent rate.

        Args:
            num_waiting: Requests in the queue.
            now: Present time, in monotonic seconds.

        Returns:
            Seconds, from 1 to 60; 1 while the rate is unknown.
        """
        if len(self._ends) < 2 or now <= self._ends[0]:
            return 1.0
        rate = len(self._ends) / (now - self._ends[0])
        return min(_MAX_RETRY_AFTER_S, max(1.0, num_waiting / rate))

"""Numbers of a GenerationLoop, for metrics and for the answer to a full queue."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_MAX_RETRY_AFTER_S = 60.0


@dataclass(slots=True)
class SchedulerStats:
    """Present state (the first six), and counts since the loop was made.

    kv_used_blocks: blocks that requests held after the last exchange. oldest_waiting_s: age of the request at the
    head of the queue, 0 when none waits. prompt_tokens and prefix_hit_tokens: of admitted requests, each once.
    prefix_cache_hits, _misses, _evictions: blocks, as the ledger counts them since it was made.
    runs: messages to the workers; steps: forward passes that came back; decisions: ledger exchanges that scheduled;
    extensions: exchanges that asked for more steps of a run in progress.
    """

    queued: int = 0
    running: int = 0
    oldest_waiting_s: float = 0.0
    kv_used_blocks: int = 0
    kv_total_blocks: int = 0
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


class CompletionRate:
    """How fast requests have been ending lately."""

    def __init__(self, window: int = 32) -> None:
        self._ends: deque[float] = deque(maxlen=window)

    def note(self, now: float) -> None:
        """A request ended at `now` (monotonic seconds)."""
        self._ends.append(now)

    def retry_after(self, num_waiting: int, now: float) -> float:
        """Seconds, from 1 to 60, in which `num_waiting` requests leave the queue at the recent rate; 1 while nothing
        is known."""
        if len(self._ends) < 2 or now <= self._ends[0]:
            return 1.0
        rate = len(self._ends) / (now - self._ends[0])
        return min(_MAX_RETRY_AFTER_S, max(1.0, num_waiting / rate))

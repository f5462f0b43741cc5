"""Quarantine: finds the request that takes the workers down (a poison request), and counts failures.

A request that took part in two failed runs without a token between them is quarantined: it is admitted alone and runs
alone, while the others keep their blocks and pause. A token clears it. After two more failures alone, it is the cause.
"""

from __future__ import annotations

from collections.abc import Iterable

from max_ray.scheduler.recovery import MAX_FAILURES
from max_ray.scheduler.scheduled_request import ScheduledRequest

QUARANTINE_FAILURES = 2
"""Failed runs after which a request runs alone."""
POISON_FAILURES = 4
"""Failed runs after which a request that ran alone is the cause."""
MAX_POISON_REQUESTS = 2
"""Consecutive poison requests after which no single request is held responsible."""


class Quarantine:
    """Failed runs of each request, since it last got a token."""

    def __init__(self) -> None:
        self._num_failed_runs: dict[ScheduledRequest, int] = {}
        self._in_run: list[ScheduledRequest] = []
        self._num_failures = 0
        self._num_poison = 0

    @property
    def must_fail_all(self) -> bool:
        """Whether so many failures followed each other that all requests must fail."""
        return self._num_failures >= MAX_FAILURES

    @property
    def has_failed_runs(self) -> bool:
        """Whether a request took part in a failed run and got no token since."""
        return bool(self._num_failed_runs)

    def holds(self, request: ScheduledRequest) -> bool:
        """Whether a request must run alone."""
        return self._num_failed_runs.get(request, 0) >= QUARANTINE_FAILURES

    def first_of(self, requests: Iterable[ScheduledRequest]) -> ScheduledRequest | None:
        """The first request that must run alone."""
        if not self._num_failed_runs:
            return None
        return next(filter(self.holds, requests), None)

    def begin_run(self, requests: list[ScheduledRequest]) -> None:
        """A run of these requests begins."""
        self._in_run = requests

    def end_run(self) -> None:
        """The run ended without a failure."""
        self._in_run = []

    def note_step(self) -> None:
        """A step came back: earlier failures are no longer consecutive."""
        self._num_failures = self._num_poison = 0

    def note_tokens(self, requests: Iterable[ScheduledRequest | None]) -> None:
        """These requests got tokens (None: one that has ended)."""
        for request in requests:
            if request is not None:
                self.release(request)

    def release(self, request: ScheduledRequest) -> None:
        """A request got a token, or ended."""
        self._num_failed_runs.pop(request, None)

    def attribute_failure(self) -> ScheduledRequest | None:
        """Counts a failure of the workers; the request that caused it, once that is known."""
        self._num_failures += 1
        requests, self._in_run = self._in_run, []
        for request in requests:
            self._num_failed_runs[request] = self._num_failed_runs.get(request, 0) + 1
        is_poison = len(requests) == 1 and self._num_failed_runs[requests[0]] >= POISON_FAILURES
        for request in requests:
            if request.outputs.closed:  # it ended before the failure
                self.release(request)
        if not is_poison:
            return None
        self._num_poison += 1
        self._num_failures = MAX_FAILURES if self._num_poison > MAX_POISON_REQUESTS else 0
        return requests[0]

    def reset_failures(self) -> None:
        """All requests have failed: the next ones start afresh."""
        self._num_failures = 0

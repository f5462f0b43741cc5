"""KeyUsage: requests and tokens of one API key in this replica, against its limits.

A limit a minute is a bucket that holds a minute's worth and is refilled all the time. The prompt's tokens are taken
when a request starts, those of the answer when it ends; with no token in the bucket, requests are refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Limits of a key; None: no limit.

    Args:
        max_concurrent_requests: HTTP requests at a time.
        requests_per_minute: HTTP requests.
        tokens_per_minute: Of prompts and answers.
    """

    max_concurrent_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(slots=True)
class _Bucket:
    level: float
    filled_at: float

    def refill(self, per_minute: int, now: float) -> float:
        """The level now."""
        self.level = min(float(per_minute), self.level + (now - self.filled_at) * per_minute / 60)
        self.filled_at = now
        return self.level


@dataclass(slots=True)
class KeyUsage:
    """What a key uses.

    Args:
        limits: Of the key.
        clock: Seconds, monotonic.

    Attributes:
        num_open: HTTP requests in progress.
    """

    limits: KeyLimits = field(default_factory=KeyLimits)
    clock: Callable[[], float] = time.monotonic
    num_open: int = 0
    _requests: _Bucket | None = None
    _tokens: _Bucket | None = None

    def refusal(self) -> tuple[str, float] | None:
        """Which limit a further request would exceed, and after how many seconds it would not; None: it may begin.

        A request that may begin is taken from the bucket of requests.
        """
        limits = self.limits
        if limits.max_concurrent_requests is not None and self.num_open >= limits.max_concurrent_requests:
            return f"{limits.max_concurrent_requests} requests at a time", 1.0
        if limits.tokens_per_minute is not None:
            level = self._bucket_of_tokens(limits.tokens_per_minute).refill(limits.tokens_per_minute, self.clock())
            if level < 1:
                return f"{limits.tokens_per_minute} tokens a minute", (1 - level) * 60 / limits.tokens_per_minute
        if limits.requests_per_minute is not None:
            if self._requests is None:
                self._requests = _Bucket(float(limits.requests_per_minute), self.clock())
            level = self._requests.refill(limits.requests_per_minute, self.clock())
            if level < 1:
                return f"{limits.requests_per_minute} requests a minute", (1 - level) * 60 / limits.requests_per_minute
            self._requests.level -= 1
        return None

    def add_tokens(self, num_tokens: int) -> None:
        """So many tokens were used."""
        if self.limits.tokens_per_minute is not None:
            self._bucket_of_tokens(self.limits.tokens_per_minute).level -= num_tokens

    def _bucket_of_tokens(self, per_minute: int) -> _Bucket:
        if self._tokens is None:
            self._tokens = _Bucket(float(per_minute), self.clock())
        return self._tokens

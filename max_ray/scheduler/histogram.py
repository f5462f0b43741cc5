"""Histogram: counts per bucket, as Prometheus has it."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field


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

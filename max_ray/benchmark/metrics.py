"""From parsed requests to a report: percentiles, throughput, goodput, failures. Only successes count for speed.

ttft: from sending to the first text. tpot: time after it over the tokens after it, per request. itl: gaps between
chunks of text, all requests together. e2e: from sending to the end of the stream. The report is a plain
dict that becomes the JSON file; SCHEMA names its shape, and changes whenever the shape does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from max_ray.benchmark.stream import Result
from max_ray.errors import ConfigError

SCHEMA = "max_ray.benchmark.serving/1"
PERCENTILES = (50, 90, 99)
GOODPUT_METRICS = ("ttft", "tpot", "e2e")

Report = dict[str, Any]


@dataclass(frozen=True)
class ClientCost:
    """CPU seconds of this process while the load ran, and reads it made: is the client the bottleneck?"""

    cpu_s: float
    num_reads: int


def parse_goodput(limits: Sequence[str]) -> dict[str, float]:
    """`["ttft:200", "tpot:50"]` to milliseconds by metric. Raises ConfigError."""
    found: dict[str, float] = {}
    for limit in limits:
        metric, _, value = limit.partition(":")
        try:
            found[metric] = float(value)
        except ValueError:
            metric = ""
        if metric not in GOODPUT_METRICS or not 0 < found[metric] < inf:
            known = ", ".join(GOODPUT_METRICS)
            raise ConfigError(f"--goodput must look like ttft:200 (milliseconds; one of {known}), not {limit!r}.")
    return found


def summarize(
    results: Sequence[Result], duration_s: float, cost: ClientCost, goodput: Mapping[str, float]
) -> dict[str, Any]:
    """The measured part of a report."""
    good = [result for result in results if result.failure is None]
    num_output = sum(result.num_output for result in good)
    num_input = sum(result.num_input for result in good)
    num_chunks = sum(len(result.times) for result in good)
    return {
        "duration_s": round(duration_s, 4),
        "requests": {
            "total": len(results),
            "succeeded": len(good),
            "failed": len(results) - len(good),
            "shorter_than_asked": sum(result.num_output < result.output_len for result in good),
        },
        "failures": _failures(results),
        "tokens": {"input": num_input, "output": num_output, "text_chunks": num_chunks},
        "throughput": {
            "requests_per_s": _rate(len(good), duration_s),
            "output_tokens_per_s": _rate(num_output, duration_s),
            "total_tokens_per_s": _rate(num_input + num_output, duration_s),
        },
        "latency_ms": _latencies(good),
        "goodput": _goodput(good, len(results), duration_s, goodput),
        "client": _client(results, duration_s, cost),
    }


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Milliseconds of values in seconds: how many, mean, percentiles (linear interpolation); None without values."""
    if not values:
        return {"count": 0, "mean": None, **{f"p{q}": None for q in PERCENTILES}}
    milliseconds = np.asarray(values, dtype=np.float64) * 1e3
    points = np.percentile(milliseconds, PERCENTILES)
    percentiles = {f"p{q}": round(float(point), 3) for q, point in zip(PERCENTILES, points, strict=True)}
    return {"count": len(values), "mean": round(float(milliseconds.mean()), 3), **percentiles}


def _latencies(good: Sequence[Result]) -> dict[str, Any]:
    return {
        "ttft": spread([result.ttft for result in good]),
        "tpot": spread([result.tpot for result in good if result.tpot is not None]),
        "itl": spread([gap for result in good for gap in result.itl]),
        "e2e": spread([result.e2e for result in good]),
    }


def _failures(results: Sequence[Result]) -> dict[str, Any]:
    """By kind: how many, and what the first of them said."""
    kinds: dict[str, Any] = {}
    for result in results:
        if result.failure is not None:
            entry = kinds.setdefault(result.failure.kind, {"count": 0, "example": result.failure.message})
            entry["count"] += 1
    return dict(sorted(kinds.items()))


def _goodput(good: Sequence[Result], total: int, duration_s: float, limits: Mapping[str, float]) -> Report | None:
    """Requests that met every limit; a request without a second token has met any TPOT. Failed ones met none."""
    if not limits:
        return None
    num_met = sum(_meets(result, limits) for result in good)
    return {
        "limits_ms": dict(limits),
        "requests_per_s": _rate(num_met, duration_s),
        "share": round(num_met / total, 4) if total else 0.0,
    }


def _meets(result: Result, limits: Mapping[str, float]) -> bool:
    return all((getattr(result, metric) or 0.0) * 1e3 <= limit for metric, limit in limits.items())


def _client(results: Sequence[Result], duration_s: float, cost: ClientCost) -> Report:
    lags = [result.start - result.due for result in results if result.failure is None]
    return {
        "cpu_s": round(cost.cpu_s, 4),
        "cpu_share": _rate(cost.cpu_s, duration_s),
        "reads": cost.num_reads,
        "cpu_us_per_read": round(cost.cpu_s / cost.num_reads * 1e6, 2) if cost.num_reads else None,
        "start_lag_ms_p99": spread(lags)["p99"],
    }


def _rate(amount: float, duration_s: float) -> float:
    return round(amount / duration_s, 4) if duration_s > 0 else 0.0

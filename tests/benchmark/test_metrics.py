"""Results to reports: every number against a plain computation."""

from __future__ import annotations

import random

import pytest

from max_ray.benchmark.client import Failure
from max_ray.benchmark.metrics import ClientCost, parse_goodput, spread, summarize
from max_ray.benchmark.stream import Result
from max_ray.errors import ConfigError
from tests.benchmark.naive import percentile


def result(start: float, times: list[float], num_output: int, *, output_len: int = 4, end: float = 9.0) -> Result:
    return Result(start, start, end, output_len, times=times, last=times[-1], num_input=10, num_output=num_output)


def failed(kind: str, message: str = "m") -> Result:
    return Result(0.0, 0.0, 1.0, 4, Failure(kind, message))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100, 101])
def test_spread_is_the_naive_percentile(count: int) -> None:
    values = [random.Random(count).expovariate(3) for _ in range(count)]
    found = spread(values)
    assert found["count"] == count
    assert found["mean"] == pytest.approx(sum(values) / count * 1e3, abs=1e-3)
    for percent in (50, 90, 99):
        assert found[f"p{percent}"] == pytest.approx(percentile(values, percent) * 1e3, abs=1e-3)


def test_spread_of_nothing() -> None:
    assert spread([]) == {"count": 0, "mean": None, "p50": None, "p90": None, "p99": None}


def test_one_request_by_hand() -> None:
    one = result(1.0, [1.5, 1.6, 1.9], num_output=5, end=2.0)
    assert one.ttft == pytest.approx(0.5)
    assert one.tpot == pytest.approx(0.4 / 4)  # tokens, not chunks
    assert one.itl == pytest.approx([0.1, 0.3])
    assert one.e2e == pytest.approx(1.0)
    assert result(1.0, [1.5], num_output=1).tpot is None


def test_summary() -> None:
    results = [
        result(0.0, [1.0, 2.0], 2, output_len=4, end=2.0),
        result(1.0, [1.1, 1.2, 1.4], 4, output_len=4, end=3.0),
        failed("http_500", "first"),
        failed("http_500", "second"),
        failed("reset"),
    ]
    found = summarize(results, 4.0, ClientCost(cpu_s=0.5, num_reads=1000), {})
    assert found["requests"] == {"total": 5, "succeeded": 2, "failed": 3, "shorter_than_asked": 1}
    assert found["failures"] == {
        "http_500": {"count": 2, "example": "first"},
        "reset": {"count": 1, "example": "m"},
    }
    assert found["tokens"] == {"input": 20, "output": 6, "text_chunks": 5}
    assert found["throughput"] == {"requests_per_s": 0.5, "output_tokens_per_s": 1.5, "total_tokens_per_s": 6.5}
    assert found["latency_ms"]["ttft"]["p50"] == pytest.approx(550)
    assert found["latency_ms"]["tpot"]["mean"] == pytest.approx((1000 + 100) / 2)
    assert found["latency_ms"]["itl"]["count"] == 3
    assert found["latency_ms"]["e2e"]["p50"] == pytest.approx(2000)
    assert found["goodput"] is None
    assert (found["client"]["cpu_us_per_read"], found["client"]["cpu_share"]) == (500, 0.125)


def test_nothing_succeeded() -> None:
    found = summarize([failed("connect")], 0.0, ClientCost(0.0, 0), {"ttft": 1.0})
    assert found["throughput"]["output_tokens_per_s"] == 0
    assert found["client"]["cpu_us_per_read"] is None
    assert found["goodput"]["share"] == 0


def test_goodput_needs_every_limit_and_counts_failures_as_missed() -> None:
    quick = result(0.0, [0.1, 0.2], 2, end=0.3)
    late = result(0.0, [0.5, 0.6], 2, end=0.7)
    slow = result(0.0, [0.1, 0.9], 2, end=1.0)
    single = result(0.0, [0.1], 1, end=0.1)  # has no TPOT
    results = [quick, late, slow, single, failed("reset")]

    def share(**limits: float) -> float:
        return float(summarize(results, 2.0, ClientCost(0.0, 1), limits)["goodput"]["share"])

    assert share(ttft=200) == 0.6
    assert share(tpot=150) == 0.6
    assert share(ttft=200, tpot=150) == 0.4
    assert share(ttft=200, tpot=150, e2e=200) == 0.2
    good = summarize(results, 2.0, ClientCost(0.0, 1), {"ttft": 200.0})["goodput"]
    assert (good["requests_per_s"], good["limits_ms"]) == (1.5, {"ttft": 200.0})


def test_goodput_limits_as_they_are_written() -> None:
    assert parse_goodput(["ttft:200", "tpot:12.5"]) == {"ttft": 200.0, "tpot": 12.5}
    assert parse_goodput([]) == {}


@pytest.mark.parametrize("limit", ["", "ttft", "ttft:", "ttft:x", "itl:5", "ttft:0", "ttft:-1", "ttft:nan", "ttft:inf"])
def test_goodput_limits_that_say_nothing(limit: str) -> None:
    with pytest.raises(ConfigError, match="--goodput must look like ttft:200"):
        parse_goodput([limit])

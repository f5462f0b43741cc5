"""/metrics, /version, /v1/models; the page is read by Prometheus' own parser."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

import max_ray
from max_ray.scheduler import Histogram, SchedulerStats
from max_ray.serve.api.metrics import Metrics
from max_ray.serve.api.metrics_page import render_metrics
from tests.http.fake_engine import FakeEngine

NOT_EXPORTED = {
    *("prompt_tokens", "generated_tokens"),  # the routes count these
    "healthy",  # /health tells it
    "batch_size",  # a histogram
}


def families(text: bytes | str) -> Iterable[Metric]:
    return text_string_to_metric_families(text if isinstance(text, str) else text.decode())


def samples(text: bytes | str) -> dict[tuple[str, ...], float]:
    """(name, replica, further label values...) -> value."""
    found = {}
    for family in families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "fake"
            found[(sample.name, labels.pop("replica"), *sorted(labels.values()))] = sample.value
    return found


async def test_numbers_of_all_replicas(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/v1/completions", json={"model": "fake", "prompt": "ab"})
    await client.post("/v1/chat/completions", json={"model": "fake", "messages": []})
    await client.get("/v1/nothing")
    reply = await client.get("/metrics")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = samples(reply.text)
    assert found["max_ray_requests_total", "r0", "/v1/completions", "200"] == 1
    assert found["max_ray_requests_total", "r0", "/v1/chat/completions", "400"] == 1
    assert found["max_ray_requests_total", "r0", "404", "other"] == 1
    assert found["max_ray_queued_requests", "r0"] == 2
    assert found["max_ray_running_requests", "r0"] == 3
    assert found["max_ray_kv_blocks_used", "r0"] == 5
    assert found["max_ray_kv_blocks_capacity", "r0"] == found["max_ray_kv_blocks_capacity", "r1"] == 64
    assert found["max_ray_prompt_tokens_total", "r0"] == 3
    assert found["max_ray_generated_tokens_total", "r0"] == 6
    assert found["max_ray_generated_tokens_total", "r1"] == 0
    assert found["max_ray_time_to_first_token_seconds_count", "r0", "/v1/completions"] == 1
    assert found["max_ray_inter_token_latency_seconds_count", "r0", "/v1/completions"] == 5
    assert found["max_ray_request_duration_seconds_count", "r0", "/v1/completions", "2xx"] == 1
    assert found["max_ray_request_duration_seconds_count", "r0", "/v1/chat/completions", "4xx"] == 1
    assert found["max_ray_request_duration_seconds_count", "r0", "4xx", "other"] == 1


async def test_merged_tokens_share_their_latency(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.tokens_per_output = 3
    await client.post("/v1/completions", json={"model": "fake", "prompt": "ab"})
    counts = engine.metrics.of_route("/v1/completions")
    assert counts.time_to_first_token.count == 1
    assert counts.inter_token_latency.count == 3


@pytest.mark.parametrize(
    ("value", "counts"), [(0.0, [1, 0, 0]), (1.0, [1, 0, 0]), (1.1, [0, 1, 0]), (2.0, [0, 1, 0]), (2.1, [0, 0, 1])]
)
def test_histogram_borders(value: float, counts: list[int]) -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(value)
    assert histogram.counts == counts


def test_a_snapshot_does_not_change_afterwards() -> None:
    metrics = Metrics("fake", "r0", ["/v1/completions"])
    before = metrics.snapshot(SchedulerStats())
    metrics.count_request("/v1/completions", 200, 0.1)
    metrics.of_route("/v1/completions").time_to_first_token.observe(0.1)
    found = samples(render_metrics([before]))
    assert found["max_ray_time_to_first_token_seconds_count", "r0", "/v1/completions"] == 0
    assert not before.requests


def test_what_the_scheduling_loop_counts_is_on_the_page_once() -> None:
    counted = [field.name for field in fields(SchedulerStats) if field.name not in NOT_EXPORTED]
    stats = SchedulerStats(**{name: 1000 + i for i, name in enumerate(counted)})
    found = list(samples(render_metrics([Metrics("fake", "r0").snapshot(stats)])).values())
    assert [found.count(1000 + i) for i in range(len(counted))] == [1] * len(counted)


def test_counters_and_gauges_have_their_type_and_a_help() -> None:
    page = render_metrics([Metrics("fake", "r0").snapshot(SchedulerStats())])
    assert [family.name for family in families(page) if not family.documentation.endswith(".")] == []
    types = dict(line.split()[2:] for line in page.decode().splitlines() if line.startswith("# TYPE"))
    assert all((kind == "counter") == name.endswith("_total") for name, kind in types.items())
    assert types["max_ray_oldest_queued_request_seconds"] == types["max_ray_kv_blocks_used"] == "gauge"
    assert types["max_ray_request_duration_seconds"] == "histogram"


def test_histograms_are_cumulative_and_keep_their_bounds() -> None:
    metrics = Metrics("fake", "r0")
    for value in (0.001, 0.25, 0.26, 1.0, 31.0):
        metrics.of_route("/v1/completions").time_to_first_token.observe(value)
    [family] = [
        family
        for family in families(render_metrics([metrics.snapshot(SchedulerStats())]))
        if family.name == "max_ray_time_to_first_token_seconds"
    ]
    buckets = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
    assert " ".join(buckets) == "0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 30 +Inf"
    assert list(buckets.values()) == [1, 1, 1, 1, 1, 2, 3, 4, 4, 4, 4, 4, 5]
    rest = {s.name.rsplit("_", 1)[1]: s.value for s in family.samples if not s.name.endswith("_bucket")}
    assert rest == {"count": 5, "sum": pytest.approx(32.511)}


def test_label_values_are_escaped() -> None:
    text = render_metrics([Metrics('a"b\\c\nd', "r").snapshot(SchedulerStats())])
    [family] = [f for f in families(text) if f.name == "max_ray_queued_requests"]
    assert family.samples[0].labels["model_name"] == 'a"b\\c\nd'


def test_phases_of_the_start_are_gauges() -> None:
    text = render_metrics([Metrics("m", "r").snapshot(SchedulerStats(), {"load": 2.5, "compile": 0.5})])
    [family] = [f for f in families(text) if f.name == "max_ray_startup_phase_seconds"]
    assert {s.labels["phase"]: s.value for s in family.samples} == {"load": 2.5, "compile": 0.5}


async def test_models_and_version(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert (await client.get("/v1/models/fake")).json() == listed["data"][0]
    assert listed["data"][0]["id"] == "fake"
    assert listed["data"][0]["max_model_len"] == 200
    assert listed["data"][0]["chat_template"] == {
        "roles": ["system", "developer", "user", "assistant", "tool"],
        "names": ["system", "developer", "user", "assistant"],
        "content": "string",
        "system": "anywhere",
        "tools": False,
        "tool_calls": False,
    }
    assert listed["data"][0]["tool_call_parser"] == "json"
    assert listed["data"][0]["reasoning_parser"] == "none"
    assert (await client.get("/version")).json() == {"version": max_ray.__version__}

"""Ray's own Prometheus endpoint has what `/metrics` has, under the same names behind `ray_`."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from max_ray.scheduler import SchedulerStats
from max_ray.serve.api.metric_families import FAMILIES, REPLICA_LABELS
from max_ray.serve.api.metrics import TEXT_ROUTES, FinishedChoice, Metrics, MetricsSnapshot
from max_ray.serve.api.metrics_page import render_metrics
from max_ray.serve.ray_metrics import REFRESH_TURNS, RayMetrics
from tests.serve.applications import deployed, text_of

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
_LABELS = {*REPLICA_LABELS, "le", *(label for family in FAMILIES for label in family.labels)}  # Ray adds its own
REPORTED_WITHIN_S = 60.0


def samples(page: str, prefix: str = "") -> Samples:
    """Our samples by name and labels; names without `prefix`, and labels without those that Ray adds."""
    found: Samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name.startswith(f"{prefix}max_ray_"):
                labels = {k: v for k, v in sample.labels.items() if k in _LABELS}
                found[sample.name.removeprefix(prefix), tuple(sorted(labels.items()))] = sample.value
    return found


class FakeGauge:
    """Remembers what it was set to."""

    made: list[FakeGauge]

    def __init__(self, name: str, text: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.text, self.tag_keys = name, text, tag_keys
        self.values: Samples = {}
        self.num_sets = 0
        FakeGauge.made.append(self)

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.tag_keys
        self.values[self.name, tuple(sorted(tags.items()))] = value
        self.num_sets += 1


@pytest.fixture(autouse=True)
def no_gauges() -> None:
    FakeGauge.made = []


def published() -> tuple[Samples, int]:
    values = {key: value for gauge in FakeGauge.made for key, value in gauge.values.items()}
    return values, sum(gauge.num_sets for gauge in FakeGauge.made)


def busy_metrics() -> Metrics:
    metrics = Metrics("m", "r", TEXT_ROUTES)
    for seconds in (0.001, 0.02, 400.0):
        metrics.count_request("/v1/completions", 200, seconds)
        metrics.of_route("/v1/completions").time_to_first_token.observe(seconds)
        metrics.of_route("/v1/completions").finish(FinishedChoice("stop", 9, 4, 5, 1, seconds, seconds, None, seconds))
    return metrics


def snapshot_of(metrics: Metrics, steps: int = 7) -> MetricsSnapshot:
    return metrics.snapshot(SchedulerStats(steps=steps), {"load": 2.5})


def test_every_sample_of_the_page_is_published() -> None:
    snapshot = snapshot_of(busy_metrics())
    RayMetrics(FakeGauge).publish(snapshot)
    assert published()[0] == samples(render_metrics([snapshot]).decode())
    assert len({gauge.name for gauge in FakeGauge.made}) == len(FakeGauge.made), "a gauge is made once"
    assert all(gauge.text.endswith(".") for gauge in FakeGauge.made)


def test_changes_are_published_at_once_and_the_rest_is_refreshed_in_turns() -> None:
    metrics, ray_metrics = busy_metrics(), RayMetrics(FakeGauge)
    ray_metrics.publish(snapshot_of(metrics))
    values, num_first = published()
    assert num_first == len(values)
    counts = []
    for _ in range(REFRESH_TURNS):
        before = published()[1]
        ray_metrics.publish(snapshot_of(metrics))
        counts.append(published()[1] - before)
    assert sum(counts) == num_first
    assert max(counts) <= num_first / REFRESH_TURNS + 1
    metrics.generated_tokens += 3
    ray_metrics.publish(snapshot_of(metrics, steps=8))
    values, _ = published()
    own = (("model_name", "m"), ("replica", "r"))
    assert (values["max_ray_generated_tokens_total", own], values["max_ray_steps_total", own]) == (3, 8)


def test_new_series_come_with_new_routes() -> None:
    metrics, ray_metrics = busy_metrics(), RayMetrics(FakeGauge)
    ray_metrics.publish(snapshot_of(metrics))
    metrics.of_route("/v1/messages").finish(FinishedChoice("length", 1, 0, 5, 0, 0.1, 0.1, 0.1, 0.3))
    ray_metrics.publish(snapshot_of(metrics))
    assert published()[0] == samples(render_metrics([snapshot_of(metrics)]).decode())


@pytest.mark.ray
@pytest.mark.slow
async def test_rays_endpoint_tells_what_the_application_tells(
    ray_cluster: Any, tiny_llama: Path, serve_port: int
) -> None:
    async with deployed(tiny_llama, serve_port, "in-ray") as served:
        for prompt in ("a", "b", "c"):
            await text_of(served, prompt)
        (node,) = [one for one in ray_cluster.nodes() if one["Alive"]]
        endpoint = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        deadline = time.monotonic() + REPORTED_WITHIN_S
        async with httpx.AsyncClient(timeout=30) as client:
            own = samples((await client.get(f"{served.url}/metrics", headers=served.headers)).text)
            while True:
                (replica,) = {dict(labels)["replica"] for _, labels in own}
                found = samples((await client.get(endpoint)).text, "ray_")
                found = {key: value for key, value in found.items() if dict(key[1])["replica"] == replica}
                if found == own:
                    break
                missing = sorted(str(key) for key in own if found.get(key) != own[key])
                assert time.monotonic() < deadline, missing[:5]
                await asyncio.sleep(1)
    tokens = [value for (name, _), value in own.items() if name == "max_ray_generated_tokens_total"]
    assert tokens[0] > 3
    firsts = [value for (name, _), value in own.items() if name == "max_ray_time_to_first_token_seconds_count"]
    assert sorted(firsts) == [0, 3]

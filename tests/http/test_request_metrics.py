"""Histograms of requests by route: phases, tokens, ends; and the page against Prometheus' own parser, at random."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from max_ray.errors import QueueFullError, WorkerGroupError
from max_ray.scheduler import Histogram, SchedulerStats
from max_ray.serve.api.answer import generate
from max_ray.serve.api.batches.lines import LineRequest
from max_ray.serve.api.batches.runner import LineRunner
from max_ray.serve.api.metrics import TEXT_ROUTES, FinishedChoice, Metrics, MetricsSnapshot, merged
from max_ray.serve.api.metrics_page import MetricsPage, render_metrics
from max_ray.serve.api.openai import CompletionRequest
from max_ray.serve.api.routes import build_api, build_line_api
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.http.fake_engine import FakeEngine
from tests.scheduler.fakes import make_context
from tests.scheduler.harness import running
from tests.scheduler.test_admission import LoopEngine

COMPLETIONS = "/v1/completions"
PHASES = ("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds")


def values(text: bytes | str, **labels: str) -> dict[str, float]:
    """Samples with these labels, by name without prefix, buckets left out."""
    page = text if isinstance(text, str) else text.decode()
    return {
        sample.name.removeprefix("max_ray_"): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if labels.items() <= sample.labels.items() and "le" not in sample.labels
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(write_byte_level(tmp_path_factory.mktemp("metrics")), max_length=60)


async def test_phases_of_a_request_that_waited(small: TextTokenizer) -> None:
    async with running(max_batch_size=1, max_queued=8, budget=8) as harness:
        engine = LoopEngine(small, harness.loop)
        before = harness.loop.submit(make_context("before", [1], 40))
        await harness.at_step(2)
        transport = httpx.ASGITransport(build_api(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"prompt": [7, 8, 9], "max_tokens": 10, "ignore_eos": True}
            answer_id = (await client.post(COMPLETIONS, json=body)).json()["id"]
            (choice,) = (await client.get(f"/v1/requests/{answer_id}")).json()["choices"]
        (snapshot,) = [engine.metrics.snapshot(harness.loop.stats)]
        found = values(render_metrics([snapshot]), route=COMPLETIONS)
        assert found["request_queue_time_seconds_sum"] == pytest.approx(choice["queue_ms"] / 1e3, abs=1e-5)
        assert found["request_prefill_time_seconds_sum"] == pytest.approx(choice["prefill_ms"] / 1e3, abs=1e-5)
        assert found["request_decode_time_seconds_sum"] == pytest.approx(choice["decode_ms"] / 1e3, abs=0.1)
        per_token = found["request_decode_time_seconds_sum"] / 9
        assert found["request_time_per_output_token_seconds_sum"] == pytest.approx(per_token)
        phases = sum(found[f"{name}_sum"] for name in PHASES)
        assert phases <= found["e2e_request_latency_seconds_sum"]
        assert found["e2e_request_latency_seconds_count"] == found["request_success_total"] == 1
        assert (found["request_prompt_tokens_sum"], found["request_generation_tokens_sum"]) == (3, 10)
        assert [output async for output in before][-1].is_done
        batches = values(render_metrics([engine.metrics.snapshot(harness.loop.stats)]))
        assert batches["batch_size_count"] == batches["steps_total"]
        assert batches["batch_size_sum"] == 50, "tokens of both requests, one a step each"


async def test_preemptions_are_counted_by_route(small: TextTokenizer) -> None:
    async with running(max_batch_size=2, max_queued=8, budget=8, num_blocks=8) as harness:
        engine = LoopEngine(small, harness.loop)
        before = harness.loop.submit(make_context("before", [1], 28))
        transport = httpx.ASGITransport(build_api(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"prompt": [7, 8, 9], "max_tokens": 20, "ignore_eos": True}
            await client.post(COMPLETIONS, json=body)
        found = values(render_metrics([engine.metrics.snapshot(harness.loop.stats)]))
        assert found["request_preemptions_total"] == found["preemptions_total"] >= 1
        assert [output async for output in before][-1].is_done


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (COMPLETIONS, {"prompt": "ab", "n": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ab"}]}),
        ("/v1/responses", {"input": "ab"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 9}),
        ("/api/generate", {"prompt": "ab", "stream": False}),
    ],
)
async def test_every_dialect_has_its_route(
    client: httpx.AsyncClient, engine: FakeEngine, route: str, body: dict[str, object]
) -> None:
    engine.cached_tokens = 2
    assert (await client.post(route, json={"model": "fake", **body})).status_code == 200
    num = 2 if "n" in body else 1
    text = (await client.get("/metrics")).text
    found = values(text, route=route, replica="r0", finished_reason="stop")
    assert found == {"request_success_total": num}
    found = values(text, route=route, replica="r0")
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_generation_tokens"):
        assert found[f"{name}_count"] == num
    assert found["request_cached_tokens_sum"] == 2 * num
    (snapshot, _) = await engine.metrics_snapshots()
    assert [name for name, counts in snapshot.routes.items() if counts.finished] == [route]


async def test_python_handles_and_lines_of_batches_have_labels_of_their_own(engine: FakeEngine) -> None:
    async for _ in generate(engine, CompletionRequest(prompt="ab")):
        pass
    lines = LineRunner(build_line_api(engine))
    line = LineRequest("one", COMPLETIONS, {"model": "fake", "prompt": "ab"})
    assert (await asyncio.create_task(lines.run(line)))[0]
    snapshot, _ = await engine.metrics_snapshots()
    assert {name: dict(counts.finished) for name, counts in snapshot.routes.items()} == {
        "python": {"stop": 1},
        "/v1/batches": {"stop": 1},
    }


async def test_a_failure_is_an_abort_and_a_refusal_is_nothing(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.failure, engine.fail_after = WorkerGroupError("gone"), 2
    await client.post(COMPLETIONS, json={"prompt": "ab"})
    engine.refuse = QueueFullError("full", retry_after=1.0)
    await client.post(COMPLETIONS, json={"prompt": "ab"})
    found = (await engine.metrics_snapshots())[0].routes[COMPLETIONS]
    assert found.finished == Counter({"abort": 1})
    assert (found.time_to_first_token.count, found.total.count, found.decode.count) == (1, 0, 0)
    assert (found.prompt_tokens.count, found.generated_tokens.total) == (1, 2)


def test_series_exist_from_the_start() -> None:
    text = render_metrics([Metrics("m", "r", TEXT_ROUTES).snapshot(SchedulerStats())])
    for route in TEXT_ROUTES:
        found = values(text, route=route)
        assert found["time_to_first_token_seconds_count"] == found["request_generation_tokens_count"] == 0


def test_a_snapshot_of_routes_does_not_change_afterwards() -> None:
    metrics = Metrics("m", "r")
    metrics.of_route("/a").finish(FinishedChoice("stop", 1, 0, 5, 0, 0.1, 0.1, 0.1, 0.3))
    before = metrics.snapshot(SchedulerStats())
    text = render_metrics([before])
    metrics.of_route("/a").finish(FinishedChoice("stop", 1, 0, 5, 3, 0.1, 0.1, 0.1, 0.3))
    metrics.of_route("/a").inter_token_latency.observe(1.0)
    metrics.of_route("/b")
    assert render_metrics([before]) == text


finite = st.floats(0, 1e6, allow_nan=False)
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=8)


@st.composite
def snapshots(draw: st.DrawFn) -> MetricsSnapshot:
    metrics = Metrics(draw(names), draw(names))
    for route in draw(st.lists(names, max_size=3, unique=True)):
        counts = metrics.of_route(route)
        for value in draw(st.lists(finite, max_size=5)):
            counts.time_to_first_token.observe(value)
            counts.finish(FinishedChoice("stop", int(value), 1, 2, 3, value, None, value, value))
    for route, status, seconds in draw(st.lists(st.tuples(names, st.integers(200, 599), finite), max_size=4)):
        metrics.count_request(route, status, seconds)
    return metrics.snapshot(SchedulerStats(steps=draw(st.integers(0, 2**53))), draw(st.dictionaries(names, finite)))


@settings(max_examples=60, deadline=None)
@given(snapshots())
def test_the_parser_finds_what_was_counted(snapshot: MetricsSnapshot) -> None:
    page = MetricsPage()
    page.render([snapshot])
    families = list(text_string_to_metric_families(page.render([snapshot]).decode()))
    assert len({family.name for family in families}) == len(families)
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value for family in families for sample in family.samples
    }
    own = (("model_name", snapshot.model_name), ("replica", snapshot.replica))
    assert found["max_ray_steps_total", *own] == float(snapshot.stats.steps)
    for (route, status), count in snapshot.requests.items():
        key = ("max_ray_requests_total", *own, ("route", route), ("status", str(status)))
        assert found[key] == count
    for phase, seconds in snapshot.startup_phases.items():
        assert found["max_ray_startup_phase_seconds", own[0], ("phase", phase), own[1]] == seconds
    for route, counts in snapshot.routes.items():
        histogram, where = counts.time_to_first_token, (*own, ("route", route))
        assert found["max_ray_time_to_first_token_seconds_sum", *where] == histogram.total
        assert found["max_ray_time_to_first_token_seconds_count", *where] == histogram.count
        below = 0
        for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
            below += count
            text = bound if isinstance(bound, str) else f"{bound:g}"
            assert found["max_ray_time_to_first_token_seconds_bucket", ("le", text), *where] == below


def test_replicas_that_come_and_go_leave_nothing_behind() -> None:
    page = MetricsPage()
    for number in range(400):
        page.render([Metrics("m", f"r{number}", TEXT_ROUTES).snapshot(SchedulerStats())])
    assert len(page._beginnings) < 5000


def test_a_scrape_is_cheap() -> None:
    """Of one replica after traffic on three routes, 631 lines: 0.12 ms of CPU; the bound is for a busy machine."""
    metrics = Metrics("m", "r")
    for route in (*TEXT_ROUTES, "/v1/responses"):
        metrics.count_request(route, 200, 0.1)
        metrics.count_request(route, 400, 0.1)
        metrics.of_route(route).finish(FinishedChoice("stop", 1, 0, 5, 0, 0.1, 0.1, 0.1, 0.3))
    page, snapshot = MetricsPage(), metrics.snapshot(SchedulerStats())
    page.render([snapshot])
    times = []
    for _ in range(50):
        begin = time.thread_time()
        page.render([snapshot])
        times.append(time.thread_time() - begin)
    assert sorted(times)[25] < 0.6e-3


def test_sums_of_histograms() -> None:
    assert merged([]) is None
    one, two = Histogram((1.0,)), Histogram((1.0,))
    one.observe(0.5)
    two.observe(3.0, 2)
    total = merged([one, two])
    assert total is not None
    assert (total.counts, total.total) == ([1, 2], 6.5)
    assert one.counts == [1, 0]

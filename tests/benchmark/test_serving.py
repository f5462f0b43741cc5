"""Whole runs against a scripted server on loopback: what is measured, what is counted as failed, what is sent when."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from itertools import count, pairwise
from typing import Any

import jsonschema
import pytest

from max_ray.benchmark.client import normal_url
from max_ray.benchmark.datasets import Conversation, DataSettings, Turn
from max_ray.benchmark.load import Pace
from max_ray.benchmark.metrics import Report
from max_ray.benchmark.report import table
from max_ray.benchmark.serving import ServingSettings, measure
from max_ray.errors import ConfigError, MaxRayError
from tests.benchmark.sse_server import Answer, Script, ScriptedServer, scripted_server

ONE_AT_A_TIME = Pace(max_concurrency=1)


def conversations(number: int, turns: int = 1) -> list[Conversation]:
    return [tuple(Turn(f"question {i}.{turn}", 3) for turn in range(turns)) for i in range(number)]


async def bench(
    server: ScriptedServer,
    number: int = 1,
    *,
    turns: int = 1,
    warmups: int = 0,
    key: str | None = None,
    **settings: Any,
) -> Report:
    given = {"base_url": server.url, "data": DataSettings(), "pace": ONE_AT_A_TIME} | settings
    return await measure(ServingSettings(**given), conversations(number, turns), conversations(warmups), key)


def in_turn(*answers: Answer) -> Script:
    """The n-th request gets the n-th answer; the last one is repeated."""
    numbers = count()
    return lambda body: answers[min(next(numbers), len(answers) - 1)]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
async def test_known_delays_are_what_is_measured(endpoint: str) -> None:
    answer = Answer(texts=["x"] * 5, ttft=0.1, gap=0.03)
    async with scripted_server(lambda body: answer) as server:
        report = await bench(server, 4, endpoint=endpoint, pace=Pace(max_concurrency=4))
    latency = report["latency_ms"]
    assert report["requests"] == {"total": 4, "succeeded": 4, "failed": 0, "shorter_than_asked": 0}
    assert report["tokens"] == {"input": 28, "output": 20, "text_chunks": 20}
    assert 100 <= latency["ttft"]["p50"] < 150
    assert 30 <= latency["tpot"]["p50"] < 45
    assert latency["itl"]["count"] == 16
    assert 27 <= latency["itl"]["p50"] < 45
    assert 220 <= latency["e2e"]["p50"] < 320
    assert 0.22 <= report["duration_s"] < 0.35
    assert report["throughput"]["output_tokens_per_s"] == pytest.approx(20 / report["duration_s"], rel=1e-3)


async def test_tokens_are_the_servers_count_and_not_chunks() -> None:
    usage = {"prompt_tokens": 11, "completion_tokens": 9}
    async with scripted_server(lambda body: Answer(texts=["a b c", "d e f"], gap=0.08, usage=usage)) as server:
        report = await bench(server)
    assert report["tokens"] == {"input": 11, "output": 9, "text_chunks": 2}
    assert 10 <= report["latency_ms"]["tpot"]["p50"] < 16  # 80 ms over 8 tokens


async def test_goodput_is_what_met_the_limits() -> None:
    script = in_turn(Answer(), Answer(ttft=0.15), Answer(status=500))
    async with scripted_server(script) as server:
        report = await bench(server, 3, goodput={"ttft": 100.0})
    assert report["goodput"]["share"] == pytest.approx(1 / 3, abs=1e-4)


FAULTS = {
    "http_500": Answer(status=500),
    "http_429": Answer(status=429),
    "truncated": Answer(stop_after=1),
    "no_usage": Answer(usage={}),
    "error_event": Answer(extra=[b'data: {"error": {"message": "died"}}\n\n']),
    "bad_event": Answer(extra=[b"data: {nonsense\n\n"]),
    "reset": Answer(stop_after=1, reset=True),
}


@pytest.mark.parametrize("kind", FAULTS)
async def test_a_failure_is_counted_by_its_kind_and_is_no_success(kind: str) -> None:
    async with scripted_server(in_turn(Answer(), FAULTS[kind], Answer())) as server:
        report = await bench(server, 3)
    assert {name: entry["count"] for name, entry in report["failures"].items()} == {kind: 1}
    assert report["requests"]["succeeded"] == 2
    assert report["tokens"]["output"] == 6
    assert report["latency_ms"]["ttft"]["count"] == 2
    assert f"1 x {kind}: " in table(report)


@pytest.mark.parametrize("answer", [Answer(stop_after=2, clean=True), Answer(done=False), Answer(finish_reason=None)])
async def test_a_stream_that_ends_early_and_politely_is_no_success(answer: Answer) -> None:
    async with scripted_server(lambda body: answer) as server:
        report = await bench(server)
    assert list(report["failures"]) == ["truncated"]


@pytest.mark.parametrize("reset", [False, True])
async def test_a_connection_that_ends_before_any_answer(reset: bool) -> None:
    async with scripted_server(lambda body: Answer(status=0, reset=reset)) as server:
        report = await bench(server, model="m")
    assert list(report["failures"]) == ["reset"]


async def test_an_answer_that_is_not_http() -> None:
    async with scripted_server(lambda body: Answer(extra=[b"SSH-2.0\r\n\r\n"], status=1)) as server:
        report = await bench(server, model="m")
    assert list(report["failures"]) == ["protocol"]


async def test_a_request_that_takes_too_long() -> None:
    async with scripted_server(lambda body: Answer(ttft=5.0)) as server:
        report = await bench(server, 2, timeout_s=0.15, pace=Pace(max_concurrency=2))
    assert report["failures"]["timeout"]["count"] == 2
    assert report["duration_s"] < 2


async def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        closed = ScriptedServer(lambda body: Answer())
        closed.url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        report = await bench(closed, 2, model="m")
        assert {kind: entry["count"] for kind, entry in report["failures"].items()} == {"connect": 2}
        with pytest.raises(MaxRayError, match="Is the server up"):
            await bench(closed)


async def test_answers_shorter_than_asked_are_told() -> None:
    async with scripted_server(in_turn(Answer(texts=["a"]), Answer())) as server:
        report = await bench(server, 2)
    assert report["requests"]["shorter_than_asked"] == 1
    assert "1 answers than asked for" in table(report)


async def test_events_cut_at_any_byte() -> None:
    async with scripted_server(lambda body: Answer(split=7)) as server:
        report = await bench(server)
    assert report["requests"]["succeeded"] == 1
    assert report["tokens"]["text_chunks"] == 3


@pytest.mark.parametrize("concurrency", [1, 3, 8])
async def test_concurrency_is_kept_full_and_not_passed(concurrency: int) -> None:
    async with scripted_server(lambda body: Answer(ttft=0.02)) as server:
        report = await bench(server, 9, pace=Pace(max_concurrency=concurrency))
    assert report["requests"]["succeeded"] == 9
    assert concurrency <= server.most_running <= concurrency + 1  # the last one may still be closing


async def test_requests_go_out_at_the_arrival_times_however_slow_the_answers() -> None:
    pace = Pace(request_rate=50.0, seed=3)
    async with scripted_server(lambda body: Answer(ttft=0.4)) as server:
        report = await bench(server, 15, pace=pace, model="m")
    came = [seen.time - server.seen[0].time for seen in server.seen]
    assert came == pytest.approx(pace.arrivals(15), abs=0.05)
    assert server.most_running >= 12
    assert report["client"]["start_lag_ms_p99"] < 50


def test_arrivals_are_a_poisson_process() -> None:
    times = Pace(request_rate=20.0, seed=1).arrivals(20_001)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert times[0] == 0.0
    assert mean == pytest.approx(1 / 20, rel=0.03)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.05)  # exponential: as large as the mean
    assert times == Pace(request_rate=20.0, seed=1).arrivals(20_001)
    assert times != Pace(request_rate=20.0, seed=2).arrivals(20_001)
    assert Pace(request_rate=float("inf")).arrivals(3) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("pace", [{}, {"request_rate": 1.0, "max_concurrency": 1}, {"request_rate": 0.0}])
def test_paces_that_are_none(pace: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--request-rate"):
        Pace(**pace)


async def test_chat_turns_send_the_history() -> None:
    async with scripted_server(lambda body: Answer(texts=["fine", " then"])) as server:
        report = await bench(server, 1, turns=3, endpoint="chat", model="m")
    messages = [seen.body["messages"] for seen in server.seen]
    reply = {"role": "assistant", "content": "fine then"}
    first, second, third = ({"role": "user", "content": f"question 0.{turn}"} for turn in range(3))
    assert messages == [[first], [first, reply, second], [first, reply, second, reply, third]]
    assert report["requests"]["succeeded"] == 3


async def test_completion_turns_send_the_history_and_stop_at_a_failure() -> None:
    async with scripted_server(in_turn(Answer(texts=[" A"]), Answer(status=503))) as server:
        report = await bench(server, 1, turns=4, model="m")
    assert [seen.body["prompt"] for seen in server.seen] == ["question 0.0", "question 0.0 A question 0.1"]
    assert {kind: entry["count"] for kind, entry in report["failures"].items()} == {"http_503": 1, "not_sent": 2}
    assert report["requests"]["total"] == 4


async def test_what_is_sent() -> None:
    async with scripted_server() as server:
        await bench(server, 2, key="secret", model="given", data=DataSettings(seed=9))
        plain = server.seen[-1]
        await bench(server, 2, temperature=0.5, ignore_eos=True, data=DataSettings(seed=9))
        drawn = server.seen[-1]
    assert plain.path == "/v1/completions"
    assert plain.headers["authorization"] == "Bearer secret"
    expected = {"model": "given", "max_tokens": 3, "temperature": 0.0, "prompt": "question 1.0", "stream": True}
    assert plain.body == expected | {"stream_options": {"include_usage": True}}
    changed = {"model": "served", "temperature": 0.5, "ignore_eos": True, "seed": 10}
    assert drawn.body == plain.body | changed
    assert "authorization" not in drawn.headers


async def test_the_key_is_not_in_the_report() -> None:
    async with scripted_server() as server:
        assert "secret" not in str(await bench(server, key="secret"))


async def test_warm_ups_are_sent_and_not_measured() -> None:
    async with scripted_server(in_turn(Answer(ttft=0.2), Answer(ttft=0.2), Answer())) as server:
        report = await bench(server, 3, warmups=2, model="m")
        assert len(server.seen) == 5
        assert report["requests"]["total"] == 3
        assert report["latency_ms"]["ttft"]["p99"] < 150
        server.script = lambda body: Answer(status=404)
        with pytest.raises(MaxRayError, match=r"warm-up request failed \(http_404\).*scripted"):
            await bench(server, 3, warmups=1, model="m")
        assert len(server.seen) == 6  # nothing was sent after it


SPREAD = {name: {"type": ["number", "null"]} for name in ("count", "mean", "p50", "p90", "p99")}


def exactly(**properties: Any) -> dict[str, Any]:
    """An object with these members and no others."""
    kinds = {name: {"type": kind} if isinstance(kind, str | list) else kind for name, kind in properties.items()}
    return {"type": "object", "properties": kinds, "required": list(kinds), "additionalProperties": False}


DATA = ("input_len", "output_len", "prefix_len", "turns", "max_total_len", "num_prompts", "seed")
REPORT_SCHEMA = exactly(
    schema={"const": "max_ray.benchmark.serving/1"},
    label="string",
    date="string",
    settings=exactly(
        base_url="string",
        data=exactly(**{name: ["integer", "null"] for name in DATA}, dataset="string", dataset_path=["string", "null"]),
        pace=exactly(request_rate=["number", "string", "null"], max_concurrency=["integer", "null"], seed="integer"),
        **dict.fromkeys(("model", "endpoint"), "string"),
        **dict.fromkeys(("temperature", "timeout_s", "num_warmups"), "number"),
        tokenizer=["string", "null"],
        ignore_eos="boolean",
        goodput="object",
    ),
    duration_s="number",
    requests=exactly(**dict.fromkeys(("total", "succeeded", "failed", "shorter_than_asked"), "integer")),
    failures={"type": "object", "additionalProperties": exactly(count="integer", example="string")},
    tokens=exactly(**dict.fromkeys(("input", "output", "text_chunks"), "integer")),
    throughput=exactly(**dict.fromkeys(("requests_per_s", "output_tokens_per_s", "total_tokens_per_s"), "number")),
    latency_ms=exactly(**{name: exactly(**SPREAD) for name in ("ttft", "tpot", "itl", "e2e")}),
    goodput={"anyOf": [{"type": "null"}, exactly(limits_ms="object", requests_per_s="number", share="number")]},
    client=exactly(
        **{name: ["number", "null"] for name in ("cpu_s", "cpu_share", "cpu_us_per_read", "start_lag_ms_p99")},
        reads="integer",
    ),
)  # fmt: skip


@pytest.mark.parametrize("goodput", [{}, {"ttft": 100.0, "e2e": 5.0}])
async def test_the_shape_of_a_report_is_its_schema(goodput: dict[str, float]) -> None:
    async with scripted_server(in_turn(Answer(), Answer(status=500))) as server:
        report = await bench(server, 2, goodput=goodput)
        await asyncio.sleep(0)
    jsonschema.validate(report, REPORT_SCHEMA)
    assert report["label"] == f"served at {server.url}"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_url": "127.0.0.1:8000"}, "--base-url must look like"),
        ({"base_url": "ftp://host"}, "--base-url must look like"),
        ({"base_url": "http://me:secret@host"}, "must not carry a user"),
        ({"endpoint": "responses"}, "--endpoint must be one of"),
        ({"temperature": -0.1}, "--temperature must be"),
        ({"num_warmups": -1}, "--num-warmups must be"),
        ({"timeout_s": 0.0}, "--timeout must be"),
        ({"timeout_s": float("inf")}, "--timeout must be"),
        ({"temperature": float("nan")}, "--temperature must be"),
    ],
)
def test_refusals(changes: dict[str, Any], says: str) -> None:
    settings = ServingSettings("http://host:1", DataSettings(), ONE_AT_A_TIME)
    with pytest.raises(ConfigError, match=says):
        replace(settings, **changes)


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_the_base_url_with_and_without_v1(url: str) -> None:
    assert normal_url(url) == "http://h:1"

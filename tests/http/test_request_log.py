"""What happened to a request can be asked for by its key, by the id of the answer, and is in `Server-Timing`."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.request_log import LocalSharedRecords, RequestRecord
from max_ray.serve.api.routes import build_api
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of
from tests.http.test_keys import post, serving, write
from tests.scheduler.fakes import make_context
from tests.scheduler.harness import running
from tests.scheduler.test_admission import LoopEngine

PHASES = ("prepare_ms", "queue_ms", "prefill_ms", "decode_ms")


def timing_of(reply: httpx.Response) -> dict[str, float]:
    return {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", reply.headers["server-timing"])}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    from tests.byte_tokenizer import write_byte_level

    return TextTokenizer(write_byte_level(tmp_path_factory.mktemp("log")), max_length=60)


async def test_a_request_that_waited(small: TextTokenizer) -> None:
    async with running(max_batch_size=1, max_queued=8, budget=8) as harness:
        engine = LoopEngine(small, harness.loop)
        before = harness.loop.submit(make_context("before", [1], 40))
        await harness.at_step(2)
        transport = httpx.ASGITransport(build_api(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"prompt": [7, 8, 9], "max_tokens": 10, "ignore_eos": True}
            reply = await client.post("/v1/completions", json=body)
            answer_id = reply.json()["id"]
            record = (await client.get(f"/v1/requests/{answer_id}")).json()
        assert (record["id"], record["object"], record["status"], record["key"]) == (answer_id, "request", "done", None)
        (choice,) = record["choices"]
        assert choice["wait_reason"] == "batch_full"
        assert (choice["kv_blocks"], choice["preemptions"], choice["completion_tokens"]) == (3, 0, 10)
        assert choice["finish_reason"] == "length"
        assert all(choice[name] >= 0 for name in PHASES)
        assert choice["queue_ms"] > 0
        assert sum(choice[name] for name in PHASES) <= record["total_ms"]
        assert record["usage"]["total_tokens"] == 13
        timing = timing_of(reply)
        assert timing == {name.removesuffix("_ms"): choice[name] for name in PHASES}
        assert [output async for output in before][-1].is_done


async def test_a_request_that_was_preempted(small: TextTokenizer) -> None:
    async with running(max_batch_size=2, max_queued=8, budget=8, num_blocks=8) as harness:
        engine = LoopEngine(small, harness.loop)
        before = harness.loop.submit(make_context("before", [1], 28))
        transport = httpx.ASGITransport(build_api(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"prompt": [7, 8, 9], "max_tokens": 20, "ignore_eos": True}
            answer_id = (await client.post("/v1/completions", json=body)).json()["id"]
            (choice,) = (await client.get(f"/v1/requests/{answer_id}")).json()["choices"]
        assert choice["preemptions"] >= 1
        assert [output async for output in before][-1].is_done


async def test_a_request_in_progress(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    engine.gate = asyncio.Event()
    body = {"prompt": "ab", "max_tokens": 3}
    asking = asyncio.create_task(client.post("/v1/completions", json=body))
    while not engine.contexts:
        await asyncio.sleep(0.001)
    (answer_id,) = engine.requests._records
    assert (await client.get(f"/v1/requests/{answer_id}")).json()["status"] == "in_progress"
    engine.gate.set()
    assert (await asking).json()["id"] == answer_id
    assert (await client.get(f"/v1/requests/{answer_id}")).json()["status"] == "done"


@pytest.mark.parametrize(
    ("route", "extra"),
    [
        ("/v1/completions", {"prompt": "ab"}),
        ("/v1/chat/completions", {}),
        ("/v1/messages", {"model": "fake"}),
        ("/v1/responses", {"input": "x", "messages": None}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_every_dialect_with_ids(
    client: httpx.AsyncClient, route: str, extra: dict[str, Any], stream: bool
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "stream": stream} | extra
    if route == "/v1/responses":
        body = {"input": "x", "max_output_tokens": 3, "stream": stream}
    if route == "/v1/completions":
        del body["messages"]
    reply = await client.post(route, json=body)
    assert reply.status_code == 200, reply.text
    answer_id = re.findall(r'"id": ?"((?:cmpl|chatcmpl|msg|resp)[-_]\w+)"', reply.text)[0]
    record = (await client.get(f"/v1/requests/{answer_id}")).json()
    assert (record["status"], record["choices"][0]["completion_tokens"]) == ("done", 3)
    assert "server-timing" in reply.headers


async def test_only_the_last_ones_are_kept(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    body = {"prompt": "ab", "max_tokens": 1}
    ids = [(await client.post("/v1/completions", json=body)).json()["id"] for _ in range(105)]
    found = [(await client.get(f"/v1/requests/{answer_id}")).status_code for answer_id in ids]
    assert found == [404] * 5 + [200] * 100
    many = await client.post("/v1/completions", json=body | {"n": 60})
    assert (await client.get(f"/v1/requests/{many.json()['id']}")).status_code == 200
    assert len(engine.requests._records) == 41
    assert error_of(await client.get("/v1/requests/none"), 404)["code"] == "not_found"


async def test_only_the_same_key_or_an_admin_reads_a_request(engine: FakeEngine, tmp_path: Path) -> None:
    path = write(tmp_path / "k", {"key": "one"}, {"key": "two"}, {"key": "boss", "admin": True})
    async with serving(engine, path) as client:
        answer_id = (await post(client, "one")).json()["id"]
        statuses = [
            (await client.get(f"/v1/requests/{answer_id}", headers={"x-api-key": key})).status_code
            for key in ("one", "two", "boss", "")
        ]
        assert statuses == [200, 404, 200, 401]


async def test_only_the_same_key_or_an_admin_reads_a_response(engine: FakeEngine, tmp_path: Path) -> None:
    path = write(tmp_path / "k", {"key": "one"}, {"key": "two"}, {"key": "boss", "admin": True})
    one, two, boss = ({"x-api-key": key} for key in ("one", "two", "boss"))
    async with serving(engine, path) as client:

        async def make(headers: dict[str, str], **fields: Any) -> httpx.Response:
            body = {"input": "x", "max_output_tokens": 2, **fields}
            return await client.post("/v1/responses", json=body, headers=headers)

        for fields in ({}, {"background": True}):
            response_id = (await make(one, **fields)).json()["id"]
            url = f"/v1/responses/{response_id}"
            for route in (url, f"{url}/input_items"):
                assert (await client.get(route, headers=two)).status_code == 404
                assert (await client.get(route, headers=one)).status_code == 200
                assert (await client.get(route, headers=boss)).status_code == 200
            assert (await client.post(f"{url}/cancel", headers=two)).status_code == 404
            assert (await client.delete(url, headers=two)).status_code == 404
            assert (await make(two, previous_response_id=response_id)).status_code == 404
            assert (await client.delete(url, headers=one)).status_code == 200
        streamed = await make(one, stream=True)
        (response_id, *_) = re.findall(r"resp_\w+", streamed.text)
        statuses = [(await client.get(f"/v1/responses/{response_id}", headers=who)).status_code for who in (one, two)]
        assert statuses == [200, 404]


async def test_with_keys_of_the_environment_each_key_is_by_itself(engine: FakeEngine) -> None:
    api = build_api(engine, ApiOptions(api_keys=("a", "b")))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
        answer_id = (await post(client, "a")).json()["id"]
        assert (await client.get(f"/v1/requests/{answer_id}", headers={"x-api-key": "b"})).status_code == 404


async def test_another_replica_tells_of_a_request(engine: FakeEngine, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "k", {"key": "one"}, {"key": "two"})
    shared, options = LocalSharedRecords(max_choices=3), ApiOptions(api_keys_file=str(path))
    other = FakeEngine(tokenizer, lambda context: "hello")
    apis = [build_api(one, options, records=shared) for one in (engine, other)]
    first, second = [httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") for api in apis]
    ids = [(await post(first, "one")).json()["id"] for _ in range(4)]
    assert (await second.get(f"/v1/requests/{ids[3]}", headers={"x-api-key": "one"})).status_code == 404
    await engine.requests.share(shared)
    await engine.requests.share(shared)
    for key, expected in (("one", [404, 200, 200, 200]), ("two", [404] * 4)):
        found = [await second.get(f"/v1/requests/{answer_id}", headers={"x-api-key": key}) for answer_id in ids]
        assert [reply.status_code for reply in found] == expected
    (await first.aclose(), await second.aclose())


async def test_a_name_that_is_used_again_takes_one_place() -> None:
    records = LocalSharedRecords(max_choices=3)
    first = RequestRecord("", {"choices": [{}]})
    await records.put_records([("a", first)])
    for _ in range(10):
        await records.put_records([("b", RequestRecord("", {"choices": [{}, {}]}))])
    assert await records.find_record("a") is first
    await records.put_records([("c", first)])
    assert await records.find_record("a") is None

"""/v1/responses: bodies, events in order, stored and background responses, on one replica and on two."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from max_ray.errors import QueueFullError, WorkerGroupError
from max_ray.serve.api.responses import background, routes
from max_ray.serve.api.responses.store import LocalResponseStore
from max_ray.serve.api.routes import build_api
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of

USER = {"role": "user", "content": "hi"}


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    reply = await client.post("/v1/responses", json={"model": "fake", "input": "hi", **fields})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def streamed(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    reply = await client.post("/v1/responses", json={"model": "fake", "input": "hi", "stream": True, **fields})
    assert reply.status_code == 200, reply.text
    events = []
    for number, block in enumerate(reply.text.removesuffix("\n\n").split("\n\n")):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        assert events[-1]["sequence_number"] == number
    return events


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


async def prompt_of(engine: FakeEngine) -> str:
    return await engine.tokenizer.decode(engine.contexts[-1].tokens.prompt)


@pytest.fixture
async def replicas(engine: FakeEngine, tokenizer: TextTokenizer) -> AsyncIterator[list[httpx.AsyncClient]]:
    """Two replicas that share a store."""
    store = LocalResponseStore()
    other = FakeEngine(tokenizer, lambda context: "other")
    transports = [httpx.ASGITransport(build_api(one, None, store)) for one in (engine, other)]
    async with (
        httpx.AsyncClient(transport=transports[0], base_url="http://test") as first,
        httpx.AsyncClient(transport=transports[1], base_url="http://test") as second,
    ):
        yield [first, second]


async def test_a_whole_response(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.cached_tokens = 2
    response = await ask(client, metadata={"a": "b"}, user="u", temperature=0.5, max_output_tokens=20)
    assert response["id"].startswith("resp_")
    assert (response["object"], response["status"], response["model"]) == ("response", "completed", "fake")
    (item,) = response["output"]
    assert item.pop("id").startswith("msg_")
    content = [{"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}]
    assert item == {"status": "completed", "type": "message", "role": "assistant", "content": content}
    usage = response["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (4, 6, 10)
    assert usage["input_tokens_details"]["cached_tokens"] == 2
    assert (response["metadata"], response["user"], response["temperature"]) == ({"a": "b"}, "u", 0.5)
    assert (response["max_output_tokens"], response["store"], response["tools"]) == (20, True, [])
    assert (response["error"], response["incomplete_details"]) == (None, None)
    assert await prompt_of(engine) == "<|user|>hi<|assistant|>"


async def test_the_events_of_a_stream(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: "ok"
    events = await streamed(client)
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    item_id = events[2]["item"]["id"]
    assert events[2]["item"]["content"] == []
    assert all(event["item_id"] == item_id for event in events[3:8])
    assert [event["delta"] for event in events[4:6]] == ["o", "k"]
    assert events[6]["text"] == "ok"
    final = events[-1]["response"]
    assert final["output"] == [events[8]["item"]]
    assert (final["id"], final["usage"]["output_tokens"]) == (events[0]["response"]["id"], 3)
    kept = (await client.get(f"/v1/responses/{final['id']}")).json()
    assert kept == final


async def test_an_incomplete_response(client: httpx.AsyncClient) -> None:
    response = await ask(client, max_output_tokens=2)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (text_of(response), response["output"][0]["status"]) == ("he", "incomplete")
    events = await streamed(client, max_output_tokens=2)
    assert events[-1]["type"] == "response.incomplete"
    assert (await client.get(f"/v1/responses/{response['id']}")).json()["status"] == "incomplete"


@pytest.mark.parametrize(
    ("items", "prompt"),
    [
        ("hi", "<|user|>hi<|assistant|>"),
        ([USER], "<|user|>hi<|assistant|>"),
        ([{"type": "message", **USER}], "<|user|>hi<|assistant|>"),
        ([{"role": "user", "content": [{"type": "input_text", "text": "a"}]}], "<|user|>a<|assistant|>"),
        ([{"role": "system", "content": "s"}, USER], "<|system|>s<|user|>hi<|assistant|>"),
        (
            [
                USER,
                {"type": "reasoning", "id": "rs_1", "summary": []},
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "y", "annotations": [], "logprobs": []}],
                },
                {"role": "user", "content": "more"},
            ],
            "<|user|>hi<|assistant|>y<|user|>more<|assistant|>",
        ),
    ],
)
async def test_forms_of_input(client: httpx.AsyncClient, engine: FakeEngine, items: Any, prompt: str) -> None:
    await ask(client, input=items)
    assert await prompt_of(engine) == prompt


async def test_instructions_are_of_one_response(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    first = await ask(client, instructions="s")
    assert await prompt_of(engine) == "<|system|>s<|user|>hi<|assistant|>"
    second = await ask(client, previous_response_id=first["id"], input="more")
    assert await prompt_of(engine) == "<|user|>hi<|assistant|>hello<|user|>more<|assistant|>"
    assert second["previous_response_id"] == first["id"]


async def test_a_conversation_over_two_replicas(replicas: list[httpx.AsyncClient], engine: FakeEngine) -> None:
    """Each turn on the other replica, many times over; whole and streamed turns mixed."""
    rng = random.Random(2)
    previous: str | None = None
    expected = ""
    for turn in range(8):
        number = turn % 2
        fields = {"previous_response_id": previous, "input": f"{turn}"}
        if rng.random() < 0.5:
            response = (await streamed(replicas[number], **fields))[-1]["response"]
        else:
            response = await ask(replicas[number], **fields)
        expected += f"<|user|>{turn}<|assistant|>"
        if number == 0:
            assert await prompt_of(engine) == expected
        expected += ("hello", "other")[number]
        previous = response["id"]
        for client in replicas:
            assert (await client.get(f"/v1/responses/{previous}")).json() == response
    assert (await replicas[1].delete(f"/v1/responses/{previous}")).json()["deleted"] is True
    error_of(await replicas[0].get(f"/v1/responses/{previous}"), 404)


async def test_what_is_not_stored_or_deleted_is_not_found(client: httpx.AsyncClient) -> None:
    response = await ask(client, store=False)
    path = f"/v1/responses/{response['id']}"
    assert response["store"] is False
    for reply in (
        await client.get(path),
        await client.delete(path),
        await client.post(f"{path}/cancel"),
        await client.get(f"{path}/input_items"),
    ):
        assert error_of(reply, 404)["code"] == "not_found"
    body = {"input": "a", "previous_response_id": response["id"]}
    assert error_of(await client.post("/v1/responses", json=body), 404)["param"] == "previous_response_id"


async def test_deleting_a_response_leaves_its_successors_whole(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    first = await ask(client)
    second = await ask(client, previous_response_id=first["id"], input="b")
    await client.delete(f"/v1/responses/{first['id']}")
    await ask(client, previous_response_id=second["id"], input="c")
    assert await prompt_of(engine) == "<|user|>hi<|assistant|>hello<|user|>b<|assistant|>hello<|user|>c<|assistant|>"


async def test_input_items(client: httpx.AsyncClient) -> None:
    items = [{"role": "user", "content": str(number)} for number in range(5)]
    response = await ask(client, input=items)
    path = f"/v1/responses/{response['id']}/input_items"
    page = (await client.get(path, params={"limit": 2, "order": "asc"})).json()
    assert [item["content"] for item in page["data"]] == [[{"type": "input_text", "text": text}] for text in "01"]
    assert page["has_more"] is True
    rest = (await client.get(path, params={"order": "asc", "after": page["last_id"]})).json()
    assert [item["content"][0]["text"] for item in rest["data"]] == ["2", "3", "4"]
    assert rest["has_more"] is False
    backwards = (await client.get(path)).json()
    assert [item["content"][0]["text"] for item in backwards["data"]] == ["4", "3", "2", "1", "0"]
    for query, param in (
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"order": "up"}, "order"),
        ({"after": "msg_0"}, "after"),
        ({"befor": "x"}, "befor"),
    ):
        assert error_of(await client.get(path, params=query), 400)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type"),
        ({"input": [{"content": "a"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"role": "critic", "content": "a"}]}, "input[0].role"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content"),
        ({"input": [{"role": "user", "content": "a" * 300}]}, "input"),
        ({"input": "a" * 300}, "input"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "maybe"}, "truncation"),
        ({"background": True, "store": False}, "store"),
        ({"background": True, "stream": True}, "stream"),
        ({"max_tool_calls": "x"}, "max_tool_calls"),
        ({"stop": ["a"]}, "stop"),
    ],
)
async def test_mistakes(client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str) -> None:
    reply = await client.post("/v1/responses", json={"model": "fake", "input": "hi", **fields})
    assert error_of(reply, 400)["param"] == param
    assert not engine.contexts


async def test_neutral_fields_pass(client: httpx.AsyncClient) -> None:
    neutral: dict[str, Any] = {
        "include": [],
        "max_tool_calls": 3,
        "service_tier": "auto",
        "text": {"format": {"type": "text"}},
        "reasoning": {"summary": "auto"},
        "stream_options": {"include_obfuscation": False},
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "top_logprobs": 0,
        "truncation": "disabled",
        "conversation": None,
    }
    for name, value in neutral.items():
        await ask(client, **{name: value})


async def test_truncation_leaves_out_as_few_messages_as_possible(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    items = [{"role": ("user", "assistant")[n % 2], "content": str(n) * 38} for n in range(9)]
    body = {"input": items, "instructions": "s", "truncation": "auto", "max_output_tokens": 1}
    await ask(client, **body)
    prompt = await prompt_of(engine)
    assert prompt.startswith("<|system|>s<|")
    assert [str(n) * 38 in prompt for n in range(9)] == [False] * 5 + [True] * 4
    assert len(engine.contexts[-1].tokens.prompt) < 200
    one = {**body, "input": [{"role": "user", "content": "a" * 300}]}
    error_of(await client.post("/v1/responses", json=one), 400)
    assert all(context.request_id in engine.cancelled for context in engine.contexts[:-1])


async def test_refusals(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refuse = QueueFullError("full", retry_after=2)
    for fields in ({}, {"stream": True}, {"background": True}):
        reply = await client.post("/v1/responses", json={"input": "a", **fields})
        error_of(reply, 429)
        assert reply.headers["retry-after"] == "2"


async def test_a_stream_that_fails(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for failure, words in (
        (WorkerGroupError("The workers are gone."), "gone"),
        (RuntimeError("secret"), "server failed"),
    ):
        engine.failure, engine.fail_after = failure, 2
        events = await streamed(client)
        final = events[-1]["response"]
        assert (events[-1]["type"], final["status"], final["error"]["code"]) == (
            "response.failed",
            "failed",
            "server_error",
        )
        assert words in final["error"]["message"]
        assert final["output"][0]["status"] == "incomplete"
        error_of(await client.get(f"/v1/responses/{final['id']}"), 404)


async def test_a_store_that_does_not_answer(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete response is given, and says that it is not stored."""

    async def refuse(*args: Any) -> None:
        raise WorkerGroupError("The store does not answer.")

    monkeypatch.setattr(LocalResponseStore, "put", refuse)
    assert (await ask(client))["store"] is False
    assert (await streamed(client))[-1]["response"]["store"] is False
    error_of(await client.post("/v1/responses", json={"input": "a", "background": True}), 503)
    assert len(engine.cancelled) == 1


# Background responses.


async def until_done(client: httpx.AsyncClient, response_id: str) -> dict[str, Any]:
    async with asyncio.timeout(5):
        while True:
            response = (await client.get(f"/v1/responses/{response_id}")).json()
            if response["status"] != "in_progress":
                return dict(response)
            await asyncio.sleep(0.01)


async def test_a_background_response(replicas: list[httpx.AsyncClient], engine: FakeEngine) -> None:
    engine.gate = asyncio.Event()
    begun = await ask(replicas[0], background=True)
    assert (begun["status"], begun["background"], begun["output"]) == ("in_progress", True, [])
    assert (await replicas[1].get(f"/v1/responses/{begun['id']}")).json()["status"] == "in_progress"
    body = {"input": "a", "previous_response_id": begun["id"]}
    assert "not complete" in error_of(await replicas[1].post("/v1/responses", json=body), 400)["message"]
    engine.gate.set()
    done = await until_done(replicas[1], begun["id"])
    assert (done["status"], text_of(done), done["usage"]["output_tokens"]) == ("completed", "hello", 6)
    assert (await ask(replicas[1], **body))["status"] == "completed"


@pytest.mark.parametrize("ended_by", [0, 1])
@pytest.mark.parametrize("by_deletion", [False, True])
async def test_cancelling_on_either_replica(
    replicas: list[httpx.AsyncClient],
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    ended_by: int,
    by_deletion: bool,
) -> None:
    monkeypatch.setattr(background, "HEARTBEAT_S", 0.02)
    engine.gate = asyncio.Event()
    begun = await ask(replicas[0], background=True)
    path = f"/v1/responses/{begun['id']}"
    if by_deletion:
        assert (await replicas[ended_by].delete(path)).status_code == 200
    else:
        assert (await replicas[ended_by].post(f"{path}/cancel")).json()["status"] == "cancelled"
    async with asyncio.timeout(5):
        while not engine.cancelled:
            await asyncio.sleep(0.01)
    engine.gate.set()
    await asyncio.sleep(0.05)
    reply = await replicas[1 - ended_by].get(path)
    assert reply.status_code == (404 if by_deletion else 200)
    if not by_deletion:
        assert reply.json()["status"] == "cancelled"
        again = await replicas[0].post(f"{path}/cancel")
        assert (again.status_code, again.json()["status"]) == (200, "cancelled")


async def test_only_background_responses_are_cancelled(client: httpx.AsyncClient) -> None:
    response = await ask(client)
    error_of(await client.post(f"/v1/responses/{response['id']}/cancel"), 400)


async def test_a_background_response_that_fails(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.failure, engine.fail_after = RuntimeError("secret"), 2
    begun = await ask(client, background=True)
    done = await until_done(client, begun["id"])
    assert (done["status"], done["error"]["code"]) == ("failed", "server_error")
    assert "secret" not in json.dumps(done)


async def test_a_background_response_whose_replica_died(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.gate = asyncio.Event()
    begun = await ask(client, background=True)
    monkeypatch.setattr(routes, "DEAD_AFTER_S", -1.0)
    done = await until_done(client, begun["id"])
    assert done["status"] == "failed"
    assert "replica" in done["error"]["message"]
    await client.delete(f"/v1/responses/{begun['id']}")


# Clients.


async def test_the_official_client(server_url: str, engine: FakeEngine) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        first = await client.responses.create(model="fake", input="hi", instructions="s")
        assert (first.output_text, first.status) == ("hello", "completed")
        second = await client.responses.create(model="fake", input="more", previous_response_id=first.id)
        assert second.output_text == "hello"
        assert (await client.responses.retrieve(first.id)).output_text == "hello"
        items = await client.responses.input_items.list(second.id)
        assert [item.content[0].text async for item in items] == ["more"]  # type: ignore[union-attr]
        async with client.responses.stream(model="fake", input="hi") as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert (final.output_text, kinds[-1]) == ("hello", "response.completed")
        back: Any = [*final.output, {"role": "user", "content": "again"}]
        assert (await client.responses.create(model="fake", input=back)).output_text == "hello"
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(first.id)
        begun = await client.responses.create(model="fake", input="hi", background=True)
        while begun.status == "in_progress":
            begun = await client.responses.retrieve(begun.id)
        assert begun.output_text == "hello"
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await client.responses.create(model="fake", input="hi", temperature=-1)


async def test_random_texts_are_the_same_streamed_and_whole(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    rng = random.Random(3)
    for _ in range(30):
        text = "".join(rng.choice('ab"\\\n é😀\u2028</>') for _ in range(rng.randrange(25)))
        engine.script = lambda context, text=text: text  # type: ignore[misc]
        engine.tokens_per_output = rng.randrange(1, 4)
        response, events = await ask(client), await streamed(client)
        deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
        assert "".join(deltas) == text_of(response) == text_of(events[-1]["response"]) == text
        assert bool(response["output"]) == bool(text)

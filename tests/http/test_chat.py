"""/v1/chat/completions: messages, the stream's parts, log probabilities; the official client; many at once."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from max_ray.serve.api.answer import generate
from max_ray.serve.api.openai import ChatCompletionRequest, CompletionRequest, Message
from tests.http.fake_engine import FakeEngine

HELLO = [{"role": "user", "content": "hi"}]


async def chat(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    reply = await client.post("/v1/chat/completions", json={"model": "fake", "messages": HELLO, **fields})
    assert reply.status_code == 200, reply.text
    return reply


async def test_a_whole_answer(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = (await chat(client)).json()
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert await engine.tokenizer.decode(engine.contexts[0].tokens.prompt) == "<|user|>hi<|assistant|>"
    assert engine.contexts[0].sampling_params.max_new_tokens is None


async def test_stream_is_byte_exact(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: "ok"
    reply = await chat(client, stream=True, stream_options={"include_usage": True})
    first = json.loads(reply.text.split("\n\n")[0].removeprefix("data: "))
    head = f'"id": "{first["id"]}", "created": {first["created"]}, "model": "fake", "choices": ['
    start = f'data: {{"object": "chat.completion.chunk", {head}'
    deltas = [
        ('{"role": "assistant", "content": ""}', "null"),
        ('{"content": "o"}', "null"),
        ('{"content": "k"}', "null"),
        ("{}", '"stop"'),
    ]
    expected = "".join(
        f'{start}{{"index": 0, "delta": {delta}, "logprobs": null, "finish_reason": {reason}}}], "usage": null}}\n\n'
        for delta, reason in deltas
    )
    usage = '{"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7, "prompt_tokens_details": '
    expected += f'{start}], "usage": {usage}{{"cached_tokens": 0}}}}}}\n\ndata: [DONE]\n\n'
    assert reply.content.decode() == expected


async def test_message_forms(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": "y"},
    ]
    await chat(client, messages=messages)
    text = await engine.tokenizer.decode(engine.contexts[0].tokens.prompt, skip_special_tokens=False)
    assert text == "<|system|>s<|user|>a\nb@Ann<|assistant|>y<|assistant|>"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_both_names_of_the_limit(client: httpx.AsyncClient, engine: FakeEngine, name: str) -> None:
    answer = (await chat(client, **{name: 2})).json()
    assert engine.contexts[0].sampling_params.max_new_tokens == 2
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_log_probabilities(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: "\u00e9"
    answer = (await chat(client, logprobs=True, top_logprobs=1)).json()
    alternative = engine.tokenizer.decode_ids([5])
    top = [{"token": alternative, "logprob": -1.0, "bytes": list(alternative.encode())}]
    assert answer["choices"][0]["logprobs"] == {
        "content": [
            {"token": "bytes:\\xc3", "logprob": -0.5, "bytes": [0xC3], "top_logprobs": top},
            {"token": "bytes:\\xa9", "logprob": -0.625, "bytes": [0xA9], "top_logprobs": top},
        ],
        "refusal": None,
    }
    assert engine.contexts[0].log_probabilities == 1
    plain = (await chat(client, logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in plain] == [[], []]


async def test_official_client(server_url: str, engine: FakeEngine) -> None:
    engine.script = lambda context: "h\u00e9llo \U0001f600!"
    async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="any", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == ["fake"]
        assert (await client.models.retrieve("fake")).id == "fake"
        whole = await client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=2, n=2
        )
        assert [choice.message.content for choice in whole.choices] == ["h\u00e9llo \U0001f600!"] * 2
        stream = await client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "h\u00e9llo \U0001f600!"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 13
        text = await client.completions.create(model="fake", prompt="x", logprobs=1, echo=True)
        assert text.choices[0].text == "xh\u00e9llo \U0001f600!"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.completions.create(model="other", prompt="x")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="top_p must be"):
            await client.completions.create(model="fake", prompt="x", top_p=2)


async def test_many_streams_are_not_mixed(server_url: str, engine: FakeEngine) -> None:
    engine.script = lambda context: engine.tokenizer.decode_ids(context.tokens.prompt.tolist(), True) * 3
    words = [f"stream-{number:02}." for number in range(32)]

    async def one(client: openai.AsyncOpenAI, word: str) -> str:
        pieces = await client.completions.create(model="fake", prompt=word, max_tokens=100, stream=True)
        return "".join([piece.choices[0].text async for piece in pieces])

    async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="any", max_retries=0) as client:
        texts = await asyncio.gather(*[one(client, word) for word in words])
    assert texts == [word * 3 for word in words]
    assert engine.metrics.generated_tokens == 32 * (3 * 10 + 1)


async def test_python_callers_get_the_same_objects(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    request = ChatCompletionRequest(messages=[Message(role="user", content="hi")])
    [answer] = [part async for part in generate(engine, request)]
    assert answer["choices"] == (await chat(client)).json()["choices"]
    streamed = CompletionRequest(prompt="x", stream=True)
    texts = [part["choices"][0]["text"] async for part in generate(engine, streamed)]
    assert "".join(texts) == "hello"


async def test_a_python_caller_that_stops_early_cancels(engine: FakeEngine) -> None:
    parts = generate(engine, CompletionRequest(prompt="x", stream=True))
    await anext(parts)
    await parts.aclose()
    assert engine.cancelled == [engine.contexts[0].request_id]

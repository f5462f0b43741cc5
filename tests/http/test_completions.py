"""/v1/completions: prompts, parameters, choices, stop strings, echo, log probabilities, usage, streams."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.byte_tokenizer import BOS_ID, EOS_ID
from tests.http.fake_engine import FakeEngine


async def complete(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    reply = await client.post("/v1/completions", json={"model": "fake", "prompt": "ab", **fields})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "fake", "prompt": "ab", "stream": True, **fields}
    reply = await client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    events = reply.text.removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_a_whole_answer(client: httpx.AsyncClient) -> None:
    answer = await complete(client)
    assert answer["id"].startswith("cmpl-")
    assert isinstance(answer["created"], int)
    assert {k: answer[k] for k in ("object", "model", "choices", "usage")} == {
        "object": "text_completion",
        "model": "fake",
        "choices": [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 6,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_stream_is_byte_exact(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: 'a"\u00e9'
    reply = await client.post("/v1/completions", json={"model": "fake", "prompt": "x", "stream": True})
    first = json.loads(reply.text.split("\n\n")[0].removeprefix("data: "))
    head = f'"id": "{first["id"]}", "created": {first["created"]}, "model": "fake", "choices": [{{"index": 0, "text": '
    start, tail = f'data: {{"object": "text_completion", {head}', ', "logprobs": null, "finish_reason": '
    texts = [('"a"', "null"), ('"\\""', "null"), ('"\u00e9"', "null"), ('""', '"stop"')]
    expected = "".join(f"{start}{text}{tail}{reason}}}]}}\n\n" for text, reason in texts) + "data: [DONE]\n\n"
    assert reply.content == expected.encode()
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"


async def test_every_parameter_reaches_the_context(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "frequency_penalty": 0.2,
        "presence_penalty": -0.3,
        "repetition_penalty": 1.1,
        "seed": 42,
    }
    await complete(
        client, **given, max_tokens=4, min_tokens=2, ignore_eos=True, stop=["x", "y"], stop_token_ids=[9], logprobs=3
    )
    context = engine.contexts[0]
    params = context.sampling_params
    assert {name: getattr(params, name) for name in given} == given
    assert (params.max_new_tokens, params.min_new_tokens, params.ignore_eos) == (4, 2, True)
    assert (params.stop, params.stop_token_ids) == (("x", "y"), (9,))
    assert (context.log_probabilities, context.log_probabilities_echo, context.model_name) == (3, False, "fake")


async def test_defaults(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: "x" * 100
    answer = await complete(client, temperature=None, stop=None, user=None)
    assert engine.contexts[0].sampling_params.max_new_tokens == 16
    assert answer["choices"][0] == {"index": 0, "text": "x" * 16, "logprobs": None, "finish_reason": "length"}


async def test_max_tokens_is_a_limit_that_the_model_length_may_undercut(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = lambda context: "x" * 500
    answer = await complete(client, prompt=[7] * 190, max_tokens=500)
    assert answer["usage"]["completion_tokens"] == 10
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [[BOS_ID, "a"]]),
        (["a", "b"], [[BOS_ID, "a"], [BOS_ID, "b"]]),
        ([7, 8], [[7, 8]]),
        ([[7, 8], [9]], [[7, 8], [9]]),
    ],
)
async def test_prompt_forms(
    client: httpx.AsyncClient, engine: FakeEngine, prompt: Any, expected: list[list[Any]]
) -> None:
    answer = await complete(client, prompt=prompt)
    ids = [
        [int(engine.tokenizer.encode_text(i, False)[0]) if isinstance(i, str) else i for i in row] for row in expected
    ]
    assert [context.tokens.prompt.tolist() for context in engine.contexts] == ids
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


async def test_n_choices_of_several_prompts(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: f"{context.tokens.prompt[-1]}/{context.sampling_params.seed}"
    engine.cached_tokens = 1
    answer = await complete(client, prompt=[[7, 8], [9]], n=3, seed=40)
    assert [c["text"] for c in answer["choices"]] == ["8/40", "8/41", "8/42", "9/40", "9/41", "9/42"]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 6 * 5
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_unseeded_choices_draw_different_seeds(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await complete(client, n=4)
    assert len({context.sampling_params.seed for context in engine.contexts}) == 4


async def test_the_largest_seed_wraps(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await complete(client, n=2, seed=2**64 - 1)
    assert [context.sampling_params.seed for context in engine.contexts] == [2**64 - 1, 0]


@pytest.mark.parametrize("tokens_per_output", [1, 2, 100])
@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"),
    [("o w", "hell", 7), (["zzz", "ll"], "he", 4), ("h", "", 1), ("d!", "hello world", 12)],
)
async def test_stop_strings(
    client: httpx.AsyncClient, engine: FakeEngine, stop: Any, text: str, num_tokens: int, tokens_per_output: int
) -> None:
    engine.script = lambda context: "hello world"
    engine.tokens_per_output = tokens_per_output
    answer = await complete(client, stop=stop)
    assert answer["choices"][0] == {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
    assert answer["usage"]["completion_tokens"] == num_tokens
    engine.contexts.clear()
    pieces = await stream(client, stop=stop)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == text
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"


async def test_a_stop_string_ends_the_generation(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: "hello world"
    await complete(client, stop="ll")
    assert not engine.contexts[0].is_done
    assert engine.contexts[0].request_id in engine.cancelled


async def test_min_tokens_silences_stop_strings(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: "abcabc"
    assert (await complete(client, stop="b", min_tokens=2))["choices"][0]["text"] == "abca"


async def test_stop_token_is_not_in_the_text(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    token = int(engine.tokenizer.encode_text("l", False)[0])
    answer = await complete(client, stop_token_ids=[token], logprobs=0)
    assert answer["choices"][0]["text"] == "he"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["h", "e"]
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_ignore_eos(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: [7, EOS_ID, 8, EOS_ID, 9]
    answer = await complete(client, ignore_eos=True, max_tokens=5)
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["text"] == engine.tokenizer.decode_ids([7, 8, 9])


async def test_log_probabilities(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: "h\u00e9"
    answer = await complete(client, logprobs=2)
    top = {engine.tokenizer.decode_ids([5]): -1.0, engine.tokenizer.decode_ids([6]): -2.0}
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["h", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-3 / 8, -4 / 8, -5 / 8],
        "top_logprobs": [{**top, "h": -3 / 8}, {**top, "bytes:\\xc3": -0.5}, {**top, "bytes:\\xa9": -5 / 8}],
        "text_offset": [0, 1, 1],
    }


async def test_log_probabilities_streamed_equal_whole(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    fields = {"logprobs": 1, "echo": True, "n": 2, "seed": 1}
    whole = await complete(client, **fields)
    pieces = await stream(client, **fields)
    for index, choice in enumerate(whole["choices"]):
        mine = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        for key, values in choice["logprobs"].items():
            assert [v for p in mine if p["logprobs"] for v in p["logprobs"][key]] == values


async def test_echo(client: httpx.AsyncClient) -> None:
    answer = await complete(client, echo=True)
    assert answer["choices"][0]["text"] == "abhello"
    assert answer["choices"][0]["logprobs"] is None


async def test_echo_of_token_ids(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    ids = engine.tokenizer.encode_text("xy").tolist()
    assert (await complete(client, prompt=ids, echo=True))["choices"][0]["text"] == "xyhello"


async def test_scoring_a_prompt(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt="ab", echo=True, logprobs=0, max_tokens=0)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"] == {
        "tokens": ["<s>", "a", "b"],
        "token_logprobs": [None, -1 / 8, -2 / 8],
        "top_logprobs": [None, {"a": -1 / 8}, {"b": -2 / 8}],
        "text_offset": [0, 0, 1],
    }
    assert answer["usage"]["completion_tokens"] == 0


async def test_usage_in_a_stream(client: httpx.AsyncClient) -> None:
    pieces = await stream(client, stream_options={"include_usage": True})
    assert all(piece["usage"] is None for piece in pieces[:-1])
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"] == (await complete(client))["usage"]
    assert all("usage" not in piece for piece in await stream(client))


async def test_unfinished_bytes_come_at_the_end(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    lead_byte = int(engine.tokenizer.encode_text("\u00e9", False)[0])
    engine.script = lambda context: [lead_byte]
    assert (await complete(client))["choices"][0]["text"] == "\ufffd"

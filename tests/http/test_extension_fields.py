"""Request fields of vLLM and llama.cpp: what each one changes in the answer, whole and streamed."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from max_ray.errors import InputError
from max_ray.interfaces import TextContext
from max_ray.serve.api.answer import generate
from max_ray.serve.api.openai import CompletionRequest
from tests.byte_tokenizer import BOS_ID, EOS_ID
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"prompt": "ab", "max_tokens": 100},
}
both = pytest.mark.parametrize("route", [CHAT, COMPLETIONS])


async def ask(client: httpx.AsyncClient, route: str, **fields: Any) -> dict[str, Any]:
    reply = await client.post(route, json={**BODIES[route], **fields})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def stream(client: httpx.AsyncClient, route: str, **fields: Any) -> list[dict[str, Any]]:
    reply = await client.post(route, json={**BODIES[route], "stream": True, **fields})
    assert reply.status_code == 200, reply.text
    events = reply.text.removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return str(choice["text"])
    return str((choice.get("message") or choice["delta"]).get("content", ""))


async def texts(client: httpx.AsyncClient, route: str, **fields: Any) -> str:
    """The text of the answer, which is the same whole and streamed."""
    whole = text_of((await ask(client, route, **fields))["choices"][0])
    pieces = [text_of(chunk["choices"][0]) for chunk in await stream(client, route, **fields) if chunk["choices"]]
    assert "".join(pieces) == whole
    return whole


def prompt(engine: FakeEngine) -> list[int]:
    ids: list[int] = engine.contexts[-1].tokens.prompt.tolist()
    return ids


def ids_of(engine: FakeEngine, text: str) -> list[int]:
    ids: list[int] = engine.tokenizer.encode_text(text, False).tolist()
    return ids


# Text.


@both
async def test_include_stop_str_in_output(client: httpx.AsyncClient, engine: FakeEngine, route: str) -> None:
    engine.script = lambda context: "one END two"
    assert await texts(client, route, stop="END") == "one "
    assert await texts(client, route, stop="END", include_stop_str_in_output=True) == "one END"
    logprobs = {CHAT: {"logprobs": True}, COMPLETIONS: {"logprobs": 0}}[route]
    choice = (await ask(client, route, stop="END", include_stop_str_in_output=True, **logprobs))["choices"][0]
    content = choice["logprobs"].get("content") or choice["logprobs"]["tokens"]
    assert "".join(c if isinstance(c, str) else c["token"] for c in content) == "one END"


@both
async def test_include_stop_str_shows_a_stop_token(client: httpx.AsyncClient, engine: FakeEngine, route: str) -> None:
    engine.script = lambda context: "a!b"
    stop = {"stop_token_ids": ids_of(engine, "!")}
    assert await texts(client, route, **stop) == "a"
    assert await texts(client, route, **stop, include_stop_str_in_output=True) == "a!"
    assert await texts(client, route, stop="b<|user|>", include_stop_str_in_output=True) == "a!b"


async def test_include_stop_str_of_random_texts(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """The text with it is the text without it and the stop string, and a beginning of what the model said."""
    rng = random.Random(3)
    for _ in range(60):
        said = "".join(rng.choices("ab<é", k=rng.randint(0, 30)))
        stops = ["".join(rng.choices("ab<é", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        engine.script, engine.tokens_per_output = (lambda context, said=said: said), rng.choice([1, 2, 5])
        without = await texts(client, COMPLETIONS, stop=stops)
        with_stop = await texts(client, COMPLETIONS, stop=stops, include_stop_str_in_output=True)
        assert said.startswith(with_stop)
        is_stopped = any(stop in said for stop in stops)
        assert (with_stop.removeprefix(without) in stops) if is_stopped else with_stop == without == said


@both
async def test_skip_special_tokens(client: httpx.AsyncClient, engine: FakeEngine, route: str) -> None:
    engine.script = lambda context: [*ids_of(engine, "a"), 3, *ids_of(engine, "b"), 4]
    assert await texts(client, route) == "ab"
    for spaces in (True, False):
        fields = {"skip_special_tokens": False, "spaces_between_special_tokens": spaces}
        assert await texts(client, route, **fields) == "a<|user|>b<|assistant|>"
    shown = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    assert await texts(client, route, **shown) == "a<|user|>b<|assistant|></s>"
    assert await texts(client, route, skip_special_tokens=False, stop=["r|>b"]) == "a<|use"


# Prompts.


async def test_truncate_prompt_tokens(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for size, side, kept in ((3, None, "efg"), (3, "left", "efg"), (2, "right", "\x01a"), (50, None, "\x01abcdefg")):
        fields = {"truncate_prompt_tokens": size} | ({"truncation_side": side} if side else {})
        await ask(client, COMPLETIONS, prompt="abcdefg", **fields)
        bos = [BOS_ID] if kept.startswith("\x01") else []
        assert prompt(engine) == bos + ids_of(engine, kept.removeprefix("\x01")), fields
    await ask(client, COMPLETIONS, prompt=list(range(5, 25)), truncate_prompt_tokens=4)
    assert prompt(engine) == [21, 22, 23, 24]
    await ask(client, CHAT, truncate_prompt_tokens=3)
    assert prompt(engine) == [*ids_of(engine, "hi"), 4]
    answer = await ask(client, COMPLETIONS, prompt="abcdefg", truncate_prompt_tokens=2, echo=True)
    assert answer["choices"][0]["text"] == "fghello"
    assert answer["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("length", [198, 199, 5000, 500_000])
async def test_truncated_to_the_models_length(client: httpx.AsyncClient, engine: FakeEngine, length: int) -> None:
    """Far more than the model takes, where the request says that it may be cut; a 400 without."""
    text = "".join(random.Random(length).choices("abc ", k=length))
    await ask(client, COMPLETIONS, prompt=text, truncate_prompt_tokens=-1)
    assert prompt(engine) == ([BOS_ID] * (length == 198) + ids_of(engine, text))[-199:]
    await ask(client, CHAT, messages=[{"role": "user", "content": text}], truncate_prompt_tokens=-1)
    assert len(prompt(engine)) == 199
    assert prompt(engine)[-1] == 4
    if length > 199:
        error_of(await client.post(COMPLETIONS, json={"prompt": text}), 400)


async def test_a_text_to_truncate_is_bounded(client: httpx.AsyncClient) -> None:
    body = {"prompt": "a " * (2**19 + 1), "truncate_prompt_tokens": 5}
    assert "to be truncated" in error_of(await client.post(COMPLETIONS, json=body), 400)["message"]


async def test_add_special_tokens(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(client, COMPLETIONS)
    assert prompt(engine) == [BOS_ID, *ids_of(engine, "ab")]
    await ask(client, COMPLETIONS, add_special_tokens=False)
    assert prompt(engine) == ids_of(engine, "ab")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncation_side": "left"}, "truncation_side"),
        ({"truncate_prompt_tokens": 2, "truncation_side": "middle"}, "truncation_side"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": "1"}, "timeout"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "x" * 513}, "request_id"),
        ({"t_max_predict_ms": -2}, "t_max_predict_ms"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ],
)
@both
async def test_what_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, route: str, fields: dict[str, Any], param: str
) -> None:
    error = error_of(await client.post(route, json={**BODIES[route], **fields}), 400)
    assert error["param"] == param
    assert param.rsplit(".", maxsplit=1)[-1] in error["message"]
    assert not engine.contexts


# Ids.


@both
async def test_return_token_ids(client: httpx.AsyncClient, engine: FakeEngine, route: str) -> None:
    engine.script = lambda context: "h\u00e9llo"
    expected = [*ids_of(engine, "h\u00e9llo"), EOS_ID]
    answer = await ask(client, route, return_token_ids=True, n=2)
    ids = prompt(engine)
    for choice in answer["choices"]:
        assert choice["token_ids"] == expected
        assert choice.get("prompt_token_ids", answer.get("prompt_token_ids")) == ids
    assert "token_ids" not in json.dumps(await ask(client, route))
    chunks = await stream(client, route, return_token_ids=True)
    told = [chunk.get("prompt_token_ids") or chunk["choices"][0].get("prompt_token_ids") for chunk in chunks]
    assert told == [ids, *[None] * (len(chunks) - 1)]
    assert [i for chunk in chunks for i in chunk["choices"][0].get("token_ids") or ()] == expected


@both
async def test_token_ids_end_with_the_stop_string(client: httpx.AsyncClient, engine: FakeEngine, route: str) -> None:
    engine.script, engine.tokens_per_output = (lambda context: "abENDcd"), 100
    choice = (await ask(client, route, return_token_ids=True, stop="END"))["choices"][0]
    assert (text_of(choice), choice["token_ids"]) == ("ab", ids_of(engine, "abEND"))


@both
async def test_return_tokens_as_token_ids(client: httpx.AsyncClient, engine: FakeEngine, route: str) -> None:
    fields = {CHAT: {"logprobs": True, "top_logprobs": 1}, COMPLETIONS: {"logprobs": 1}}[route]
    choice = (await ask(client, route, **fields, return_tokens_as_token_ids=True))["choices"][0]
    names = [f"token_id:{i}" for i in ids_of(engine, "hello")]
    if route == COMPLETIONS:
        assert choice["logprobs"]["tokens"] == names
        assert set(choice["logprobs"]["top_logprobs"][0]) == {names[0], "token_id:5"}
    else:
        assert [entry["token"] for entry in choice["logprobs"]["content"]] == names
        first = choice["logprobs"]["content"][0]
        assert (first["top_logprobs"][0]["token"], bytes(first["bytes"])) == ("token_id:5", b"h")


@both
async def test_request_id(client: httpx.AsyncClient, route: str) -> None:
    head = {CHAT: "chatcmpl", COMPLETIONS: "cmpl"}[route]
    for name in ("request_id", "rid"):
        assert (await ask(client, route, **{name: 'my "id"'}))["id"] == f'{head}-my "id"'
        assert {chunk["id"] for chunk in await stream(client, route, **{name: "x"})} == {f"{head}-x"}


# Counts and time.


@both
async def test_continuous_usage_stats(client: httpx.AsyncClient, route: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(client, route, stream_options=options)
    usages = [chunk["usage"] for chunk in chunks]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert len(set(counts)) >= 5
    assert usages[-1] == usages[-2]
    assert chunks[-1]["choices"] == []
    plain = await stream(client, route, stream_options={"include_usage": True})
    assert [chunk["usage"] is None for chunk in plain] == [True] * (len(plain) - 1) + [False]


@both
async def test_timings_per_token(client: httpx.AsyncClient, engine: FakeEngine, route: str) -> None:
    assert "timings" not in await ask(client, route)
    engine.cached_tokens = 1
    timings = (await ask(client, route, timings_per_token=True))["timings"]
    num_prompt = len(prompt(engine)) - 1
    assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (1, num_prompt, 6)
    assert timings["prompt_ms"] > 0
    assert timings["predicted_ms"] > 0
    assert timings["predicted_per_second"] == pytest.approx(1000 * timings["predicted_n"] / timings["predicted_ms"])
    counts = [chunk["timings"]["predicted_n"] for chunk in await stream(client, route, timings_per_token=True)]
    assert counts == sorted(counts)
    assert counts[-1] == 6


@both
async def test_t_max_predict_ms(client: httpx.AsyncClient, engine: FakeEngine, route: str) -> None:
    """Ends behind the first line break after the time; never in the first line, and never when it is off."""
    engine.script = lambda context: "one line\ntwo\nthree"
    choice = (await ask(client, route, t_max_predict_ms=0.001))["choices"][0]
    assert (text_of(choice), choice["finish_reason"]) == ("one line\n", "length")
    assert set(engine.cancelled) == {engine.contexts[-1].request_id}
    for off in (0, -1, 60_000):
        assert await texts(client, route, t_max_predict_ms=off) == "one line\ntwo\nthree"
    engine.script = lambda context: "one line only"
    assert await texts(client, route, t_max_predict_ms=0.001) == "one line only"


@both
async def test_timeout(client: httpx.AsyncClient, engine: FakeEngine, route: str) -> None:
    engine.gate = asyncio.Event()
    error = error_of(await client.post(route, json={**BODIES[route], "timeout": 0.05}), 408)
    assert (error["code"], "0.05 s that its field 'timeout'" in error["message"]) == ("request_timeout", True)
    assert len(engine.cancelled) == 1
    reply = await client.post(route, json={**BODIES[route], "timeout": 0.05, "stream": True})
    assert reply.status_code == 200
    assert json.loads(reply.text.split("\n\n")[-2].removeprefix("data: "))["error"]["code"] == "request_timeout"
    assert len(engine.cancelled) == 2
    headers = {"x-request-timeout-seconds": "0.03"}
    reply = await client.post(route, json={**BODIES[route], "timeout": 60}, headers=headers)
    assert "x-request-timeout-seconds" in error_of(reply, 408)["message"]
    engine.gate = None
    await ask(client, route, timeout=60)


async def test_timeout_is_not_for_handles(engine: FakeEngine) -> None:
    with pytest.raises(InputError, match="timeout"):
        [_ async for _ in generate(engine, CompletionRequest(prompt="a", timeout=1))]


# Choices.


def _by_sibling(*said: str) -> Any:
    """The text of the i-th choice of a request for one prompt."""

    def script(context: TextContext) -> str:
        return said[len(said) - 1 - context.num_siblings % len(said)]

    return script


async def test_best_of(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """The fake engine's tokens are less likely the later they come: the shortest text is the likeliest."""
    engine.script = _by_sibling("aaa", "b", "cccc", "dd")
    answer = await ask(client, COMPLETIONS, best_of=4)
    assert [(c["index"], c["text"], c["logprobs"]) for c in answer["choices"]] == [(0, "b", None)]
    assert answer["usage"]["completion_tokens"] == 3 + 1 + 4 + 2 + 4
    answer = await ask(client, COMPLETIONS, best_of=4, n=2, logprobs=0)
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "b"), (1, "dd")]
    assert answer["choices"][1]["logprobs"]["tokens"] == ["d", "d"]
    answer = await ask(client, COMPLETIONS, best_of=4, n=2, prompt=["x", "yz"], return_token_ids=True, echo=True)
    assert [c["text"] for c in answer["choices"]] == ["xb", "xdd", "yzb", "yzdd"]
    assert [len(c["prompt_token_ids"]) for c in answer["choices"]] == [2, 2, 3, 3]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 2, "stream": True},
        {"best_of": 1, "n": 2},
        {"best_of": 0},
        {"best_of": 129},
        {"best_of": 65, "prompt": ["a", "b"]},
    ],
)
async def test_best_of_is_refused(client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any]) -> None:
    error = error_of(await client.post(COMPLETIONS, json={**BODIES[COMPLETIONS], **fields}), 400)
    assert error["param"] == "best_of"
    assert not engine.contexts


async def test_echo_of_a_chat(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    messages = [*BODIES[CHAT]["messages"], {"role": "assistant", "content": "I say "}]
    fields = {"messages": messages, "continue_final_message": True}
    assert await texts(client, CHAT, **fields) == "hello"
    assert await texts(client, CHAT, **fields, echo=True) == "I say hello"


# Names of llama.cpp.


@both
async def test_aliases(client: httpx.AsyncClient, engine: FakeEngine, route: str) -> None:
    choice = (await ask(client, route, n_predict=2, max_tokens=None, repeat_penalty=1.5))["choices"][0]
    assert (text_of(choice), choice["finish_reason"]) == ("he", "length")
    assert engine.contexts[-1].sampling_params.repetition_penalty == 1.5
    await ask(client, route, n_predict=2, max_tokens=2, repeat_penalty=None)
    assert engine.contexts[-1].sampling_params.max_new_tokens == 2
    engine.script = lambda context: "x" * 150
    for unlimited in (-1, -2):
        assert await texts(client, route, n_predict=unlimited, max_tokens=None) == "x" * 150
    choice = (await ask(client, route, n_probs=2))["choices"][0]
    logged = choice["logprobs"]
    top = logged["content"][0]["top_logprobs"] if route == CHAT else list(logged["top_logprobs"][0])[:2]
    assert len(top) == 2
    assert (await ask(client, route, n_probs=0))["choices"][0]["logprobs"] is None

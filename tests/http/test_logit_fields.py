"""Fields about single tokens and about the engine: what reaches the context, and what is refused."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from max_ray.interfaces import LogitControls, TextContext
from max_ray.kv_cache import lookup_hashes
from max_ray.serve.api.routes import build_api
from max_ray.tokenization.logit_texts import DEFAULT_BREAKERS
from max_ray.tokenization.token_bytes import token_text_of
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of
from tests.tokenization.kinds import WRITERS, Kind

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REQUESTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"prompt": "ab"},
}
both = pytest.mark.parametrize("route", [CHAT, COMPLETIONS])


async def context_of(client: httpx.AsyncClient, engine: FakeEngine, route: str, **fields: Any) -> TextContext:
    reply = await client.post(route, json={**REQUESTS[route], **fields})
    assert reply.status_code == 200, reply.text
    return engine.contexts[-1]


async def controls_of(client: httpx.AsyncClient, engine: FakeEngine, route: str, **fields: Any) -> LogitControls:
    controls = (await context_of(client, engine, route, **fields)).sampling_params.logit_controls
    assert controls is not None
    return controls


@both
async def test_both_forms_of_a_bias(client: httpx.AsyncClient, engine: FakeEngine, route: str) -> None:
    a, b = engine.tokenizer.encode_text("ab", False).tolist()
    controls = await controls_of(client, engine, route, logit_bias={"5": -100, "7": 2.5})
    assert controls.logit_bias == ((5, -100.0), (7, 2.5))
    controls = await controls_of(client, engine, route, logit_bias=[[5, 1], ["ab", -3], [7, False], [a, 4]])
    assert controls.logit_bias == ((5, 1.0), (a, 4.0), (b, -3.0), (7, -math.inf))


@both
async def test_numbers_arrive(client: httpx.AsyncClient, engine: FakeEngine, route: str) -> None:
    given = {
        **{"typical_p": 0.5, "xtc_probability": 0.25, "xtc_threshold": 0.125, "dry_multiplier": 0.75, "dry_base": 1.5},
        **{"dry_allowed_length": 3, "dry_penalty_last_n": 99, "repeat_last_n": 64},
    }
    controls = await controls_of(client, engine, route, allowed_token_ids=[5, 6], **given)
    assert {name: getattr(controls, name) for name in given} == given
    assert controls.allowed_token_ids == (5, 6)
    assert controls.dry_breakers


@both
async def test_what_changes_nothing_leaves_no_controls(
    client: httpx.AsyncClient, engine: FakeEngine, route: str
) -> None:
    neutral = {
        **{"logit_bias": {}, "bad_words": [], "typical_p": 1, "xtc_probability": 0, "dry_multiplier": 0, "dry_base": 2},
        **{"repeat_last_n": -1, "priority": 0, "cache_salt": None, "allowed_token_ids": None},
        **{"dry_sequence_breakers": ["x"]},
    }
    assert (await context_of(client, engine, route, **neutral)).sampling_params.logit_controls is None


async def test_a_window_beyond_the_length_is_the_whole_text(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    context = await context_of(client, engine, CHAT, repeat_last_n=200)
    assert context.sampling_params.logit_controls is None


@both
async def test_bad_words_at_the_beginning_and_behind_a_space(
    client: httpx.AsyncClient, engine: FakeEngine, route: str
) -> None:
    encode = engine.tokenizer.encode_text
    controls = await controls_of(client, engine, route, bad_words=["ab", " c"])
    assert {tuple(encode(text, False).tolist()) for text in ("ab", "c")} <= set(controls.bad_words)


@pytest.fixture(scope="module", params=list(WRITERS))
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return Kind.make(request.param, tmp_path_factory.mktemp("kinds"))


@pytest.fixture
async def caller(kind: Kind) -> AsyncIterator[tuple[httpx.AsyncClient, FakeEngine]]:
    engine = FakeEngine(kind.tokenizer, lambda context: [])
    transport = httpx.ASGITransport(build_api(engine), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client, engine


async def test_breakers_are_all_tokens_with_the_text(caller: tuple[httpx.AsyncClient, FakeEngine], kind: Kind) -> None:
    client, engine = caller
    controls = await controls_of(client, engine, COMPLETIONS, dry_multiplier=1.0, dry_sequence_breakers=["a", "b"])
    bytes_of = token_text_of(kind.tokenizer).bytes_of
    expected = {(i,) for i in range(kind.tokenizer.vocab_size) if b"a" in bytes_of(i) or b"b" in bytes_of(i)}
    assert set(controls.dry_breakers) == expected
    assert expected
    controls = await controls_of(client, engine, COMPLETIONS, dry_multiplier=1.0)
    assert all(any(text.encode() in bytes_of(head) for text in DEFAULT_BREAKERS) for head, *_ in controls.dry_breakers)


async def test_a_breaker_over_several_tokens(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    controls = await controls_of(client, engine, COMPLETIONS, dry_multiplier=1.0, dry_sequence_breakers=["xyz"])
    x, y, z = engine.tokenizer.encode_text("xyz", False).tolist()
    assert (x, y, z) in controls.dry_breakers


@both
async def test_salt_and_priority(client: httpx.AsyncClient, engine: FakeEngine, route: str) -> None:
    """The same prompt finds no cached block under another salt."""
    prompts = [await context_of(client, engine, route, cache_salt=salt) for salt in ("one", "two", "one", None)]
    hashes = [tuple(lookup_hashes(context, 1)) for context in prompts]
    assert hashes[0] == hashes[2]
    assert not set(hashes[0]) & (set(hashes[1]) | set(hashes[3]))
    assert (await context_of(client, engine, route, priority=-5)).priority == -5


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"logit_bias": {"x": 1}}, "logit_bias", "token id"),
        ({"logit_bias": {"5": "1"}}, "logit_bias", "number"),
        ({"logit_bias": {"5": False, "6": True}}, "logit_bias", "number"),
        ({"logit_bias": [[5]]}, "logit_bias", "pairs"),
        ({"logit_bias": [[True, 1]]}, "logit_bias", "token id"),
        ({"logit_bias": {"5": -101}}, "logit_bias", "-100"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "outside the model's vocabulary"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1024"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "must have an id"),
        ({"allowed_token_ids": [999999]}, "allowed_token_ids", "outside"),
        ({"bad_words": [""]}, "bad_words", "empty"),
        ({"bad_words": "a"}, "bad_words", "list"),
        ({"typical_p": 0}, "typical_p", "(0, 1]"),
        ({"xtc_probability": 2}, "xtc_probability", "[0, 1]"),
        ({"dry_base": 0.5}, "dry_base", "at least 1"),
        ({"dry_sequence_breakers": ["x" * 41]}, "dry_sequence_breakers", "40"),
        ({"repeat_last_n": -2}, "repeat_last_n", "-1"),
        ({"cache_salt": ""}, "cache_salt", "1 to"),
        ({"priority": 2**31}, "priority", "less than"),
        ({"priority": True}, "priority", "integer"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "greater"),
        ({"prompt_logprobs": 1, "stream": True}, "stream", "whole answers only"),
    ],
)
@both
async def test_mistakes(
    client: httpx.AsyncClient, engine: FakeEngine, route: str, fields: dict[str, Any], param: str, words: str
) -> None:
    error = error_of(await client.post(route, json={**REQUESTS[route], **fields}), 400)
    assert error["param"] == param or error["param"].startswith(f"{param}[")
    assert words in error["message"]
    assert not engine.contexts


async def test_a_text_that_is_no_unicode(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for field in ('"bad_words": ["\\ud800"]', '"logit_bias": [["\\ud800", 1]]'):
        reply = await client.post(COMPLETIONS, content=f'{{"prompt": "a", {field}}}')
        assert error_of(reply, 400)["param"] == field.split('"')[1]


# Log probabilities of the prompt.


@pytest.mark.parametrize("logprobs", [None, 0, 3])
@pytest.mark.parametrize("echo", [False, True])
async def test_prompt_logprobs_of_a_completion(
    client: httpx.AsyncClient, engine: FakeEngine, echo: bool, logprobs: int | None
) -> None:
    """They come beside the answer's own, with numbers of alternatives of their own."""
    fields = {"prompt": "abc", "n": 2, "echo": echo, "logprobs": logprobs, "max_tokens": 3}
    plain = (await client.post(COMPLETIONS, json=fields)).json()["choices"]
    found = (await client.post(COMPLETIONS, json={**fields, "prompt_logprobs": 2})).json()["choices"]
    ids = engine.contexts[-1].tokens.prompt.tolist()
    for choice, without in zip(found, plain, strict=True):
        first, *rest = choice.pop("prompt_logprobs")
        assert choice == without
        assert first is None
        for place, (token, entry) in enumerate(zip(ids[1:], rest, strict=True), start=1):
            assert entry[str(token)]["logprob"] == -place / 8
            tops = {str(5 + j): -j - 1 for j in range(2) if 5 + j != token}
            assert {key: entry[key]["logprob"] for key in tops} == tops
            assert {key: entry[key]["rank"] for key in tops} == {key: int(key) - 4 for key in tops}
            assert entry.keys() == {str(token), *tops}
            text_of = token_text_of(engine.tokenizer).text_of
            assert all(value["decoded_token"] == text_of(int(key)) for key, value in entry.items())


async def test_prompt_logprobs_of_a_chat(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {**REQUESTS[CHAT], "prompt_logprobs": 0}
    answer = (await client.post(CHAT, json=body)).json()
    ids = engine.contexts[-1].tokens.prompt.tolist()
    first, *rest = answer["prompt_logprobs"]
    assert first is None
    assert [list(entry) for entry in rest] == [[str(token)] for token in ids[1:]]
    assert answer["choices"][0]["message"]["content"] == "hello"
    assert answer["choices"][0]["logprobs"] is None
    assert engine.contexts[-1].log_probabilities_echo


async def test_ollama_options(client: httpx.AsyncClient, engine: FakeEngine, tmp_path: Path) -> None:
    options = {"typical_p": 0.7, "repeat_last_n": 32, "repeat_penalty": 1.2}
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "options": options}
    assert (await client.post("/api/chat", json=body)).status_code == 200
    params = engine.contexts[-1].sampling_params
    assert params.logit_controls == LogitControls(typical_p=0.7, repeat_last_n=32)
    assert params.repetition_penalty == 1.2

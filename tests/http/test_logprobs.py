"""Log probabilities of the API: offsets, tokens that print alike, empty answers, what a stop string cuts off."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from max_ray.interfaces import LogProbabilities, TextContext
from max_ray.serve.api.routes import build_api
from tests.byte_tokenizer import BYTE_OFFSET
from tests.http.fake_engine import FakeEngine
from tests.tokenization.kinds import WRITERS, Kind

NOTHING: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


async def post(client: httpx.AsyncClient, path: str = "completions", **fields: Any) -> list[dict[str, Any]]:
    reply = await client.post(f"/v1/{path}", json=fields)
    assert reply.status_code == 200, reply.text
    return list(reply.json()["choices"])


async def stream(client: httpx.AsyncClient, path: str = "completions", **fields: Any) -> list[dict[str, Any]]:
    reply = await client.post(f"/v1/{path}", json={**fields, "stream": True})
    assert reply.status_code == 200, reply.text
    events = reply.text.removesuffix("\n\ndata: [DONE]\n\n").split("\n\n")
    return [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]


def put_together(pieces: list[dict[str, Any]], index: int) -> tuple[str, dict[str, Any]]:
    mine = [piece for piece in pieces if piece["index"] == index]
    logprobs = {key: [value for piece in mine for value in piece["logprobs"][key]] for key in NOTHING}
    return "".join(piece["text"] for piece in mine), logprobs


@pytest.fixture(scope="module", params=list(WRITERS))
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return Kind.make(request.param, tmp_path_factory.mktemp("kinds"))


@pytest.fixture
def served(kind: Kind) -> FakeEngine:
    return FakeEngine(kind.tokenizer, lambda context: [])


@pytest.fixture
async def caller(served: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_api(served), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def test_offsets_of_any_tokens(caller: httpx.AsyncClient, served: FakeEngine, kind: Kind) -> None:
    """Also with the prompt's text before; streamed as whole, in steps of any size."""
    generator = random.Random(4)
    for _ in range(25):
        prompt = kind.random_ids(generator, generator.randint(1, 10))
        said = [i for i in kind.random_ids(generator, generator.randint(0, 12)) if i != kind.tokenizer.eos]
        served.script = lambda context, said=said: said  # type: ignore[misc]
        fields: dict[str, Any] = {"prompt": prompt, "max_tokens": 50, "logprobs": 0, "n": 2}
        for echo in (False, True):
            whole = await post(caller, echo=echo, **fields)
            served.tokens_per_output = generator.randint(1, 5)
            pieces = await stream(caller, echo=echo, **fields)
            for choice in whole:
                assert put_together(pieces, choice["index"]) == (choice["text"], choice["logprobs"])
                assert len(choice["logprobs"]["text_offset"]) == len(said) + echo * len(prompt)
                if echo and kind.name != "byte_sequence":
                    assert (
                        choice["logprobs"]["text_offset"][len(prompt) :] == kind.offsets(prompt + said)[len(prompt) :]
                    )


async def test_offsets_point_to_the_tokens(caller: httpx.AsyncClient, served: FakeEngine, kind: Kind) -> None:
    text = "ab a b\u00e9 ab"
    said = kind.ids(text)[len(kind.ids("ab")) :]
    served.script = lambda context: said
    (choice,) = await post(caller, prompt=kind.ids("ab"), max_tokens=50, logprobs=0)
    answer, logs = choice["text"], choice["logprobs"]
    assert kind.text(kind.ids("ab")) + answer == kind.text(kind.ids(text))
    for token, offset in zip(logs["tokens"], logs["text_offset"], strict=True):
        stripped = token.removeprefix("##").removesuffix("</w>")
        assert token.startswith("bytes:") or answer[offset:].lstrip(" ").startswith(stripped.strip(" "))


async def test_offsets_in_a_prompt_with_special_tokens_in_its_text(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    """The prompt comes back as it was written; `<s>` that nobody wrote is not in it."""
    engine.script = lambda context: "c"
    (choice,) = await post(client, prompt="a<|user|>\u00e9b", echo=True, logprobs=0)
    assert choice["text"] == "a<|user|>\u00e9bc"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 9, 9, 10, 11]
    (choice,) = await post(client, prompt="<s>a", echo=True, logprobs=0)
    assert choice["text"] == "<s>ac"
    assert choice["logprobs"]["text_offset"] == [0, 3, 4]


async def test_offsets_behind_characters_of_several_tokens(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    text = "\u4f60\u597d \U0001f600\U0001f600 caf\u00e9 na\u00efve"
    engine.script = lambda context: text
    (choice,) = await post(client, prompt="x", max_tokens=100, logprobs=0)
    assert choice["text"] == text
    assert choice["logprobs"]["text_offset"] == [i for i, c in enumerate(text) for _ in c.encode()]


async def test_tokens_that_print_alike_keep_the_higher_value(tmp_path: Path) -> None:
    kind = Kind.make("byte_fallback", tmp_path)
    byte_a, letter_a = BYTE_OFFSET + 0x61, kind.ids("ba")[-1]
    assert [kind.tokenizer.token_piece(i) for i in (byte_a, letter_a)] == ["<0x61>", "a"]
    engine = FakeEngine(kind.tokenizer, lambda context: [letter_a])
    tops = [[(letter_a, -1.0), (byte_a, -2.0)], [(byte_a, -1.0), (letter_a, -2.0)]]
    seen = []
    for top in tops:

        def entry(context: TextContext, token: int, position: int, top: Any = top) -> LogProbabilities:
            return LogProbabilities(token, dict(top).get(token, -9.0), top)

        engine._entry = entry  # type: ignore[method-assign]
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(build_api(engine)), base_url="http://test"
        ) as client:
            (choice,) = await post(client, prompt="b", logprobs=2)
        seen.append((choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]))
    assert seen == [([-1.0], [{"a": -1.0}]), ([-2.0], [{"a": -1.0}])]


async def test_an_empty_answer_has_empty_lists(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: []
    whole = await post(client, prompt="ab", logprobs=2, n=2)
    assert [choice["logprobs"] for choice in whole] == [NOTHING, NOTHING]
    pieces = await stream(client, prompt="ab", logprobs=2, n=2)
    assert [put_together(pieces, index) for index in range(2)] == [("", NOTHING)] * 2
    messages = [{"role": "user", "content": "hi"}]
    whole = await post(client, "chat/completions", messages=messages, logprobs=True, n=2)
    assert [choice["logprobs"] for choice in whole] == [{"content": [], "refusal": None}] * 2
    pieces = await stream(client, "chat/completions", messages=messages, logprobs=True, n=2)
    last = [piece for piece in pieces if piece["finish_reason"]]
    assert [piece["logprobs"] for piece in last] == [{"content": [], "refusal": None}] * 2
    for path, prompt in (("completions", {"prompt": "ab"}), ("chat/completions", {"messages": messages})):
        assert (await post(client, path, **prompt))[0]["logprobs"] is None
        assert all(piece["logprobs"] is None for piece in await stream(client, path, **prompt))


@pytest.mark.parametrize("stop", ["lo w", "l", "hello", "d", "h", ["zzz", "o"], "rld"])
async def test_tokens_of_a_stop_string_are_left_out(client: httpx.AsyncClient, engine: FakeEngine, stop: Any) -> None:
    engine.script = lambda context: "hello world"
    for tokens_per_output in (1, 3, 100):
        engine.tokens_per_output = tokens_per_output
        (choice,) = await post(client, prompt="ab", stop=stop, logprobs=1)
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert all(len(values) == len(choice["text"]) for values in choice["logprobs"].values())
        pieces = await stream(client, prompt="ab", stop=stop, logprobs=1)
        assert put_together(pieces, 0) == (choice["text"], choice["logprobs"])


@pytest.mark.parametrize(
    ("stop", "text", "tokens"), [("ba", "a", 1), ("b", "a", 1), ("ab", "", 0), ("bx", "abab", 2), ("bab", "a", 1)]
)
async def test_a_token_that_is_cut_in_part_stays(tmp_path: Path, stop: str, text: str, tokens: int) -> None:
    kind = Kind.make("byte_fallback", tmp_path)
    said = [kind.ids("bab")[-1]] * 2
    assert kind.tokenizer.token_piece(said[0]) == "ab"
    engine = FakeEngine(kind.tokenizer, lambda context: said)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(build_api(engine)), base_url="http://test") as client:
        (choice,) = await post(client, prompt="b", stop=stop, logprobs=0)
    assert choice["text"] == text
    assert (choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]) == (["ab"] * tokens, [0, 2][:tokens])


async def test_random_stop_strings(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """The tokens are those of the text, and streamed as whole."""
    generator = random.Random(5)
    for _ in range(60):
        said = "".join(generator.choice("ab\u00e9") for _ in range(12))
        engine.script = lambda context, said=said: said  # type: ignore[misc]
        engine.tokens_per_output = generator.randint(1, 6)
        stop = ["".join(generator.choice("ab\u00e9") for _ in range(generator.randint(1, 3))) for _ in range(2)]
        fields: dict[str, Any] = {"prompt": "x", "max_tokens": 30, "stop": stop, "min_tokens": generator.randint(0, 3)}
        (choice,) = await post(client, logprobs=0, **fields)
        (plain,) = await post(client, **fields)
        assert choice["text"] == plain["text"]
        offsets = [i for i, c in enumerate(choice["text"]) for _ in c.encode()]
        assert choice["logprobs"]["text_offset"] == offsets
        assert put_together(await stream(client, logprobs=0, **fields), 0) == (choice["text"], choice["logprobs"])

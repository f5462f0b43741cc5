"""Where the prompt ends and the answer begins: spaces, characters that the border cuts, one beginning-of-sequence."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from max_ray.serve.api.routes import build_api
from tests.byte_tokenizer import BOS_ID
from tests.http.fake_engine import FakeEngine
from tests.tokenization.kinds import WRITERS, Kind


@pytest.fixture(scope="module", params=list(WRITERS))
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return Kind.make(request.param, tmp_path_factory.mktemp("kinds"))


@pytest.fixture
def engine(kind: Kind) -> FakeEngine:
    return FakeEngine(kind.tokenizer, lambda context: [])


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_api(engine), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def texts(client: httpx.AsyncClient, path: str = "completions", **fields: Any) -> list[str]:
    """Of all choices; whole and streamed, which are equal."""
    reply = await client.post(f"/v1/{path}", json=fields)
    assert reply.status_code == 200, reply.text
    whole = [c["text"] if "text" in c else c["message"]["content"] for c in reply.json()["choices"]]
    reply = await client.post(f"/v1/{path}", json={**fields, "stream": True})
    pieces = [""] * len(whole)
    for event in reply.text.removesuffix("\n\ndata: [DONE]\n\n").split("\n\n"):
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            pieces[choice["index"]] += piece
    assert pieces == whole
    return whole


async def test_the_first_space_stays(client: httpx.AsyncClient, engine: FakeEngine, kind: Kind) -> None:
    said = kind.ids("ab a b")[len(kind.ids("ab")) :]
    engine.script = lambda context: said
    assert kind.tokenizer.decode_ids(kind.ids("ab") + said) == "ab a b"
    for prompt in ("ab", kind.ids("ab")):
        assert await texts(client, prompt=prompt, n=2) == [" a b"] * 2
        assert await texts(client, prompt=prompt, echo=True) == ["ab a b"]
        assert await texts(client, prompt=prompt, echo=True, logprobs=0) == ["ab a b"]


async def test_the_first_space_of_a_chat_answer(client: httpx.AsyncClient, engine: FakeEngine, kind: Kind) -> None:
    """The prompt ends with a control token; the answer is what it adds to the text of the prompt."""
    said = kind.ids("ab a b")[len(kind.ids("ab")) :]
    engine.script = lambda context: said
    answer = await texts(client, "chat/completions", messages=[{"role": "user", "content": "ab"}], n=2)
    prompt = engine.contexts[0].tokens.prompt.tolist()
    decoded = [kind.tokenizer.decode_ids(ids, True) for ids in (prompt, prompt + said)]
    assert answer == [decoded[1].removeprefix(decoded[0])] * 2 == [" a b"] * 2


async def test_a_text_that_only_control_tokens_precede(
    client: httpx.AsyncClient, engine: FakeEngine, kind: Kind
) -> None:
    said = kind.ids("a b")
    engine.script = lambda context: said
    assert await texts(client, prompt=[BOS_ID]) == [kind.tokenizer.decode_ids(said)]


async def test_random_borders(client: httpx.AsyncClient, engine: FakeEngine, kind: Kind) -> None:
    """An echo is the text of all tokens; without it, the answer is what the prompt's own text does not have."""
    generator = random.Random(3)
    for _ in range(40):
        prompt = kind.random_ids(generator, generator.randint(1, 12))
        said = [i for i in kind.random_ids(generator, generator.randint(0, 12)) if i != kind.tokenizer.eos]
        engine.script = lambda context, said=said: said  # type: ignore[misc]
        everything = kind.text(prompt + said)
        assert await texts(client, prompt=prompt, echo=True, max_tokens=50) == [everything]
        (answer,) = await texts(client, prompt=prompt, max_tokens=50)
        rest = everything.removeprefix(kind.settled(prompt))
        pending = kind.num_pending(prompt)
        num_lost = min(pending, len(rest) - len(rest.lstrip("\ufffd")))
        assert answer == rest[num_lost:], (prompt, said)


async def test_one_beginning_of_sequence(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for prompt, number in (("ab", 1), ("<s>ab", 1), ("<s><s>ab", 2), ("ab<s>", 2), ("</s>ab", 1)):
        await texts(client, prompt=prompt)
        ids = engine.contexts[-1].tokens.prompt.tolist()
        assert (ids.count(BOS_ID), ids[0]) == (number, BOS_ID), prompt


async def test_a_character_in_half(tmp_path: Path) -> None:
    """The prompt's bytes and the answer's are one character: it belongs to the answer."""
    for name in ("byte_level", "byte_fallback"):
        kind = Kind.make(name, tmp_path)
        engine = FakeEngine(kind.tokenizer, lambda context: [])
        ids = kind.ids("a\U0001f600b")
        cut = len(ids) - 3
        engine.script = lambda context, ids=ids, cut=cut: ids[cut:]  # type: ignore[misc]
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(build_api(engine)), base_url="http://test"
        ) as client:
            assert await texts(client, prompt=ids[:cut], n=2) == ["\U0001f600b"] * 2
            assert await texts(client, prompt=ids[:cut], echo=True) == ["a\U0001f600b"]
            letter = kind.ids("ab")[-1:]
            engine.script = lambda context, letter=letter: letter  # type: ignore[misc]
            assert await texts(client, prompt=ids[:cut]) == [kind.text(letter)]
            engine.script = lambda context: []
            assert await texts(client, prompt=ids[:cut]) == [""]

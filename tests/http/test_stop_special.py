"""Stop strings that are special tokens, or hold some: alone, in the middle, at the end, and others beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from max_ray.serve.api.routes import build_api
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import EOS_ID, VOCAB_SIZE, write_byte_level
from tests.http.fake_engine import FakeEngine

PAD, USER, ASSISTANT = 0, 3, 4


def ids(engine: FakeEngine, *parts: str | int) -> list[int]:
    tokens: list[int] = []
    for part in parts:
        tokens += [part] if isinstance(part, int) else engine.tokenizer.encode_text(part, False).tolist()
    return tokens


async def choice_of(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """The choice, whole and put together from a stream: both are equal."""
    body = {"prompt": "ab", "max_tokens": 50, **fields}
    reply = await client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    whole: dict[str, Any] = reply.json()["choices"][0]
    reply = await client.post("/v1/completions", json={**body, "stream": True})
    events = reply.text.removesuffix("\n\ndata: [DONE]\n\n").split("\n\n")
    pieces = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert pieces[-1]["finish_reason"] == whole["finish_reason"]
    if whole["logprobs"]:
        for key, values in whole["logprobs"].items():
            assert [value for piece in pieces for value in piece["logprobs"][key]] == values
    return whole


@pytest.mark.parametrize("tokens_per_output", [1, 3, 100])
@pytest.mark.parametrize(
    ("said", "stop", "text"),
    [
        (("one", USER, "two"), "<|user|>", "one"),
        (("one", USER, "two"), ["zzz", "<|user|>"], "one"),
        (("one\n", USER, "two"), "\n<|user|>", "one"),
        (("one\n", USER, "two"), ["zzz", "e\n<|user|>t"], "on"),
        (("one\n", USER, ASSISTANT, "two"), "<|user|><|assistant|>", "one\n"),
        (("one", USER, "two", USER, "three"), "<|user|>th", "onetwo"),
        (("one", USER, "two"), "\n<|user|>", "onetwo"),
        (("one\n", ASSISTANT, "two\n", USER), "\n<|user|>", "one\ntwo"),
        (("one", ASSISTANT, "two"), ["etw", "x<|user|>"], "on"),
        (("one", ASSISTANT, "two", USER), ["etwx", "o<|user|>"], "onetw"),
        (("one two", USER), ["two", "two<|user|>"], "one "),
        (("one", ASSISTANT, "two"), "user", "onetwo"),
        (("one <|user|> two",), "<|user|>", "one "),
        (("one\n",), "\n</s>", "one"),
        (("one\u00e9", USER), "\u00e9<|user|>", "one"),
    ],
)
async def test_stop(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    said: tuple[str | int, ...],
    stop: Any,
    text: str,
    tokens_per_output: int,
) -> None:
    engine.script = lambda context: ids(engine, *said)
    engine.tokens_per_output = tokens_per_output
    choice = await choice_of(client, stop=stop)
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    choice = await choice_of(client, stop=stop, logprobs=0)
    printed = "".join(t for t in choice["logprobs"]["tokens"] if t not in ("<|user|>", "<|assistant|>"))
    assert choice["text"] == text
    assert printed.replace("bytes:\\xc3bytes:\\xa9", "\u00e9") == text


async def test_one_special_token_is_a_stop_id(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """The generation itself ends there: the model writes no token more."""
    engine.script = lambda context: ids(engine, "one", USER, "two")
    reply = await client.post(
        "/v1/completions", json={"prompt": "ab", "stop": ["<|user|>", "x"], "stop_token_ids": [9]}
    )
    assert engine.contexts[0].sampling_params.stop_token_ids == (9, USER)
    assert engine.contexts[0].is_done
    assert reply.json()["usage"]["completion_tokens"] == 4


async def test_the_end_token_counts_although_it_is_ignored(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: ids(engine, "one", EOS_ID, "two")
    assert (await choice_of(client, ignore_eos=True, stop="</s>"))["text"] == "one"
    assert (await choice_of(client, ignore_eos=True, stop="</s>t"))["text"] == "one"
    assert (await choice_of(client, ignore_eos=True, max_tokens=7))["text"] == "onetwo"


async def test_min_tokens(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: ids(engine, "a", USER, "b", USER, "c")
    assert (await choice_of(client, min_tokens=2, stop="<|user|>"))["text"] == "ab"
    engine.script = lambda context: ids(engine, "a", USER, "b", "a", USER, "c")
    assert (await choice_of(client, min_tokens=2, stop="a<|user|>"))["text"] == "ab"


async def test_special_tokens_stay_out_of_the_text(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: ids(engine, "a", USER, PAD, "b", ASSISTANT)
    assert (await choice_of(client, stop="<|user|>x"))["text"] == "ab"


async def test_added_tokens_that_are_not_special(tmp_path: Path) -> None:
    """They are in the text, and so are stop strings that hold them."""
    path = write_byte_level(tmp_path / "added") / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(path))
    engine = FakeEngine(TextTokenizer(path.parent, max_length=200, vocab_size=VOCAB_SIZE + 1), lambda context: [])
    engine.script = lambda context: ids(engine, "one", VOCAB_SIZE, "two", USER, "three")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(build_api(engine)), base_url="http://test") as client:
        for stop, text in (
            ("<tool>", "one"),
            ("e<tool>t", "on"),
            ("<tool>two<|user|>", "one"),
            ("two<|user|>", "one<tool>"),
        ):
            assert (await choice_of(client, stop=stop))["text"] == text
        choice = await choice_of(client, logprobs=0)
    assert choice["text"] == "one<tool>twothree"
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 9, 10, 11, 12, 12, 13, 14, 15, 16]


async def test_chat(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: ids(engine, "one\n", USER, "two")
    messages = [{"role": "user", "content": "hi"}]
    for stop in ("\n<|user|>", ["\n<|user|>two", "zzz"]):
        reply = await client.post("/v1/chat/completions", json={"messages": messages, "stop": stop, "n": 2})
        assert [c["message"]["content"] for c in reply.json()["choices"]] == ["one"] * 2

"""/tokenize, /detokenize, /tokenizer_info: the same tokens as the generating routes, in vLLM's shapes."""

from __future__ import annotations

import random
from typing import Any

import httpx
import pytest

from max_ray.interfaces import PipelineTask
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import BOS_ID, CHAT_TEMPLATE, VOCAB_SIZE
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of

HELLO = [{"role": "user", "content": "hi"}]


async def tokenized(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    reply = await client.post("/tokenize", json=fields)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def test_a_prompt_has_the_tokens_of_a_completion(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for prompt in ("ab", "<s>ab", "é\n😀", "<|user|>x"):
        await client.post("/v1/completions", json={"prompt": prompt})
        expected = engine.contexts[-1].tokens.prompt.tolist()
        answer = await tokenized(client, model="fake", prompt=prompt)
        assert answer == {"count": len(expected), "max_model_len": 200, "tokens": expected, "token_strs": None}


async def test_special_tokens_may_be_left_out(client: httpx.AsyncClient) -> None:
    with_bos = (await tokenized(client, prompt="ab"))["tokens"]
    assert with_bos[0] == BOS_ID
    assert (await tokenized(client, prompt="ab", add_special_tokens=False))["tokens"] == with_bos[1:]
    assert (await tokenized(client, prompt=""))["tokens"] == [BOS_ID]
    assert (await tokenized(client, prompt="", add_special_tokens=False))["count"] == 0


async def test_token_strs(client: httpx.AsyncClient) -> None:
    answer = await tokenized(client, prompt="a b", return_token_strs=True)
    assert answer["token_strs"] == ["<s>", "a", "Ġ", "b"]


async def test_a_chat_has_the_tokens_of_the_chat_route(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/v1/chat/completions", json={"messages": HELLO})
    expected = engine.contexts[-1].tokens.prompt.tolist()
    assert (await tokenized(client, messages=HELLO))["tokens"] == expected
    assert (await tokenized(client, messages=HELLO, add_generation_prompt=False))["tokens"] == expected[:-1]


async def test_a_prompt_may_be_longer_than_the_model(client: httpx.AsyncClient) -> None:
    for length in (200, 1000, 50_000):
        assert (await tokenized(client, prompt="a" * length))["count"] == length + 1


async def test_there_and_back(client: httpx.AsyncClient) -> None:
    rng = random.Random(5)
    for _ in range(50):
        text = "".join(rng.choice("ab é😀\n<|>/s_") for _ in range(rng.randrange(30)))
        ids = (await tokenized(client, prompt=text, add_special_tokens=False))["tokens"]
        reply = await client.post("/detokenize", json={"model": "fake", "tokens": ids})
        assert reply.json() == {"prompt": text}
    reply = await client.post("/detokenize", json={"tokens": [BOS_ID, 3]})
    assert reply.json() == {"prompt": "<s><|user|>"}
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "fields", "param", "status"),
    [
        ("/tokenize", {}, "prompt", 400),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt", 400),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", 400),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens", 400),
        ("/tokenize", {"messages": HELLO, "chat_template": "x"}, "chat_template", 400),
        ("/tokenize", {"messages": HELLO, "tools": [{}]}, "tools[0].type", 400),
        ("/tokenize", {"messages": []}, "messages", 400),
        ("/tokenize", {"messages": [{"role": "critic", "content": "a"}]}, "messages[0].role", 400),
        ("/tokenize", {"prompt": ["a"]}, "prompt", 400),
        ("/tokenize", {"text": "a"}, "text", 400),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model", 404),
        ("/detokenize", {}, "tokens", 400),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens", 400),
        ("/detokenize", {"tokens": [-1]}, "tokens", 400),
        ("/detokenize", {"tokens": [2**70]}, "tokens", 400),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]", 400),
        ("/detokenize", {"tokens": [1], "model": "other"}, "model", 404),
    ],
)
async def test_mistakes(client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str, status: int) -> None:
    assert error_of(await client.post(path, json=fields), status)["param"] == param


async def test_neutral_fields_pass(client: httpx.AsyncClient) -> None:
    await tokenized(client, messages=HELLO, chat_template=None, tools=[], continue_final_message=False)


async def test_a_chat_needs_a_model_that_generates(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.task = PipelineTask.EMBEDDINGS_GENERATION
    assert error_of(await client.post("/tokenize", json={"messages": HELLO}), 400)["param"] == "model"
    assert (await tokenized(client, prompt="ab"))["count"] == 3


async def test_tokenizer_info(client: httpx.AsyncClient, tokenizer: TextTokenizer) -> None:
    info = (await client.get("/tokenizer_info")).json()
    assert info["chat_template"] == CHAT_TEMPLATE
    assert (info["bos_token"], info["eos_token"], info["pad_token"], info["unk_token"]) == (
        "<s>",
        "</s>",
        "<pad>",
        None,
    )
    assert info["tokenizer_class"]
    assert (info["vocab_size"], info["model_max_length"], info["eos_token_ids"]) == (VOCAB_SIZE, 200, [tokenizer.eos])
    assert info["added_tokens_decoder"]["3"] == {"content": "<|user|>", "special": True}

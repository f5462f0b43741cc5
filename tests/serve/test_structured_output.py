"""Structured output on a real Ray Serve: masks in the workers, and texts that outlive a worker."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.actors.helpers import kill
from tests.serve.conftest import Served
from tests.serve.test_serving import group_of, member

pytestmark = [pytest.mark.ray]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {f"key_{i}": {"enum": ["alpha", "beta", "gamma"]} for i in range(8)},
    "required": [f"key_{i}" for i in range(8)],
    "additionalProperties": False,
}
NAMED: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


async def stream(served: Served, seed: int) -> tuple[str, str | None]:
    chunks = await served.client().chat.completions.create(
        model="tiny", messages=MESSAGES, response_format=NAMED, seed=seed, stream=True, max_tokens=220
    )
    got = [chunk.choices[0] async for chunk in chunks]
    return "".join(choice.delta.content or "" for choice in got), got[-1].finish_reason


async def test_schemas_streams_and_other_kinds(served: Served) -> None:
    client = served.client()
    answer = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format=NAMED, n=3, seed=1, max_tokens=220
    )
    texts = [(choice.message.content or "", choice.finish_reason) for choice in answer.choices]
    texts += await asyncio.gather(*(stream(served, seed) for seed in range(1, 4)))
    assert texts[:3] == texts[3:]
    for text, finish_reason in texts:
        assert finish_reason == "stop"
        jsonschema.validate(json.loads(text), SCHEMA)
    for fields, allowed in (({"guided_choice": ["yes", "no"]}, ["yes", "no"]), ({"grammar": 'root ::= "a"'}, ["a"])):
        plain = await client.completions.create(model="tiny", prompt="a", max_tokens=20, extra_body=fields)
        assert plain.choices[0].text in allowed


async def test_what_cannot_be_enforced_is_a_400_and_the_workers_live(served: Served) -> None:
    client = served.client()
    for fields in ({"guided_json": {"not": {}}}, {"guided_regex": "("}, {"guided_json": {"type": "strin"}}):
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(model="tiny", prompt="a", extra_body=fields)
    assert (await client.completions.create(model="tiny", prompt="a", max_tokens=3)).choices


async def test_a_text_outlives_a_worker(served: Served) -> None:
    """The matcher is made anew from the tokens so far: the text is the same as without the fault."""
    undisturbed = [await stream(served, seed) for seed in range(4)]
    running = asyncio.gather(*(stream(served, seed) for seed in range(4)))
    await asyncio.sleep(0.2)
    kill(member(await group_of(served), "worker_0"))
    assert list(await running) == undisturbed

"""Budgets of reasoning, and reasoning before a JSON answer: what is asked of the sampler, and texts of a tiny model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import torch

from max_ray.kv_cache import LocalKVCacheClient
from max_ray.pipelines import PIPELINE_REGISTRY, PipelineConfig
from max_ray.scheduler import GenerationLoop, SchedulerLimits
from max_ray.serve.api.routes import build_api
from max_ray.structured_output import Reasoning
from tests.byte_tokenizer import CHAT_TEMPLATE
from tests.checkpoints import make_llama
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of
from tests.http.test_structured_output import CHAT, NAMED, SCHEMA, TEXT, ModelEngine
from tests.http.test_tools import HI, TOOLS, served
from tests.tokenization import chat_templates

OPEN = CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
THOUGHT = "Hm.</think>"


def spec_of(engine: FakeEngine) -> Reasoning | None:
    spec = engine.contexts[-1].sampling_params.structured_output
    return None if spec is None or spec.kind != "reasoning" else Reasoning.of(spec)


async def post(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    reply = await client.post(CHAT, json={"messages": [HI], **fields})
    assert reply.status_code == 200, reply.text
    message: dict[str, Any] = reply.json()["choices"][0]["message"]
    return message


async def test_json_behind_a_thought(tmp_path: Path) -> None:
    async with served(tmp_path, f'{THOUGHT}{{"ok": true, "n": 1}}', chat_templates.DEEPSEEK) as (client, engine):
        message = await post(client, response_format=NAMED)
        assert (message["reasoning_content"], message["content"]) == ("Hm.", '{"ok": true, "n": 1}')
        reasoning = spec_of(engine)
        assert reasoning is not None
        assert (reasoning.opener, reasoning.closer, reasoning.is_open) == ("<think>", "</think>", True)
        assert reasoning.answer is not None
        assert (reasoning.budget, reasoning.answer.text) == (None, TEXT)
        message = await post(client, response_format=NAMED, reasoning_format="none")
        assert spec_of(engine) is None
        assert engine.contexts[-1].sampling_params.structured_output is not None


async def test_reasoning_that_is_off(tmp_path: Path) -> None:
    """The prompt has closed it: nothing is left to bound or to wait for."""
    closed = chat_templates.DEEPSEEK.replace("<think>\\n", "<think>\\n\\n</think>\\n\\n")
    async with served(tmp_path, '{"ok": true, "n": 1}', closed) as (client, engine):
        assert (await post(client, response_format=NAMED))["content"] == '{"ok": true, "n": 1}'
        await post(client, thinking_token_budget=3)
        assert spec_of(engine) is None


@pytest.mark.parametrize("name", ["thinking_token_budget", "max_thinking_tokens"])
async def test_a_budget(tmp_path: Path, name: str) -> None:
    async with served(tmp_path, f"{THOUGHT}Yes.", chat_templates.QWEN) as (client, engine):
        await post(client, **{name: 7}, n=2, min_tokens=2)
        for context in engine.contexts:
            spec = context.sampling_params.structured_output
            assert spec is not None
            assert Reasoning.of(spec) == Reasoning("<think>", "</think>", False, 7)
        await post(client, **{name: -1})
        assert spec_of(engine) is None
        await post(client, **{name: 7}, tools=TOOLS, tool_choice="required")
        reasoning = spec_of(engine)
        assert reasoning is not None
        assert reasoning.answer is not None
        await post(client, tools=TOOLS, tool_choice="required")
        assert spec_of(engine) is None
        answer = await client.post(
            "/v1/messages",
            json={"messages": [HI], "max_tokens": 9, "thinking": {"type": "enabled", "budget_tokens": 4}},
        )
        assert answer.status_code == 200, answer.text
        assert spec_of(engine) == Reasoning("<think>", "</think>", False, 4)


async def test_refusals(client: httpx.AsyncClient, engine: FakeEngine, tmp_path: Path) -> None:
    for value in (5, -2):
        reply = await client.post(CHAT, json={"messages": [HI], "thinking_token_budget": value})
        assert error_of(reply, 400)["param"] == "thinking_token_budget"
    assert not engine.contexts
    async with served(tmp_path, "x", reasoning_parser="harmony") as (other, _):
        reply = await other.post(CHAT, json={"messages": [HI], "thinking_token_budget": 5})
        assert "no markers" in error_of(reply, 400)["message"]


@pytest.fixture
async def real(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A tiny model that says anything, and whose template begins a thought."""
    torch.set_num_threads(1)
    folder = make_llama(tmp_path)
    (folder / "chat_template.jinja").write_text(OPEN)
    config = PipelineConfig(model_path=str(folder), num_threads=1, devices="cpu", kv_cache_page_size=4, max_length=250)
    tokenizer, pipeline = PIPELINE_REGISTRY.retrieve(config)
    loop = GenerationLoop(pipeline, LocalKVCacheClient(pipeline.kv_manager), SchedulerLimits(8, 64, 20, 8))
    task = asyncio.create_task(loop.run())
    transport = httpx.ASGITransport(build_api(ModelEngine(tokenizer, loop)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        yield client
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_a_real_model_keeps_its_budget_and_answers_by_the_schema(real: httpx.AsyncClient) -> None:
    """A token of this model is a byte: a budget of 12 is 12 characters or fewer, and the schema holds behind it."""
    body = {"messages": [HI], "return_token_ids": True, "ignore_eos": True, "max_tokens": 60, "n": 4, "seed": 1}
    for budget in (0, 1, 12):
        reply = await real.post(CHAT, json={**body, "thinking_token_budget": budget})
        assert reply.status_code == 200, reply.text
        ids = (await real.post("/tokenize", json={"prompt": "</think>", "add_special_tokens": False})).json()["tokens"]
        for choice in reply.json()["choices"]:
            assert choice["token_ids"][budget : budget + len(ids)] == ids
            assert len(choice["token_ids"]) == 60
    fields = {"response_format": NAMED, "thinking_token_budget": 12, "n": 8, "seed": 3}
    reply = await real.post(CHAT, json={"messages": [HI], **fields})
    for choice in reply.json()["choices"]:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        assert len(choice["message"].get("reasoning_content", "")) <= 12

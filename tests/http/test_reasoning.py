"""Reasoning over HTTP: apart from the content, switched on and off, and continued messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.http.fake_engine import FakeEngine
from tests.http.test_tools import CALL, CHAT, HI, TOOLS, chunks_of, prompt_of, served
from tests.tokenization import chat_templates

THOUGHT = "<think>\nFirst this.\n</think>\n\n"
EFFORT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{{ reasoning_effort }}|{{ verbosity }}{% for d in documents or [] %}{{ d.title }}{% endfor %}"
)


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    reply = await client.post(CHAT, json={"messages": [HI], **fields})
    assert reply.status_code == 200, reply.text
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


async def refusal(client: httpx.AsyncClient, engine: FakeEngine, **fields: Any) -> tuple[str, str]:
    reply = await client.post(CHAT, json={"messages": [HI], **fields})
    assert reply.status_code == 400, reply.text
    assert engine.contexts == []
    return reply.json()["error"]["param"], reply.json()["error"]["message"]


async def test_whole_and_streamed(tmp_path: Path) -> None:
    async with served(tmp_path, f"{THOUGHT}Then that.") as (client, _):
        choice = await ask(client)
        assert choice["message"]["reasoning_content"] == "First this."
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Then that.", "stop")
        deltas = [chunk["choices"][0]["delta"] for chunk in await chunks_of(client, tools=[])]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "First this."
        assert "".join(delta.get("content", "") for delta in deltas) == "Then that."
        assert len(deltas) > 15


async def test_with_tools(tmp_path: Path) -> None:
    async with served(tmp_path, f"{THOUGHT}{CALL}") as (client, _):
        message = (await ask(client, tools=TOOLS))["message"]
        assert (message["reasoning_content"], message["content"]) == ("First this.", None)
        assert message["tool_calls"][0]["function"]["name"] == "get_weather"


async def test_it_may_be_left_out_or_in_the_text(tmp_path: Path) -> None:
    async with served(tmp_path, f"{THOUGHT}Then that.") as (client, _):
        assert "reasoning_content" not in (await ask(client, include_reasoning=False))["message"]
        message = (await ask(client, reasoning_format="none"))["message"]
        assert message == {"role": "assistant", "content": f"{THOUGHT}Then that.", "refusal": None}
        assert (await ask(client, reasoning_format="deepseek"))["message"]["reasoning_content"] == "First this."
    async with served(tmp_path / "b", f"{THOUGHT}Then that.", reasoning_parser="none") as (client, _):
        assert (await ask(client))["message"]["content"] == f"{THOUGHT}Then that."
        assert (await client.get("/v1/models/fake")).json()["reasoning_parser"] == "none"


async def test_a_prompt_that_begins_it(tmp_path: Path) -> None:
    async with served(tmp_path, "First.</think>Then.", chat_templates.DEEPSEEK) as (client, _):
        message = (await ask(client))["message"]
        assert (message["reasoning_content"], message["content"]) == ("First.", "Then.")


async def test_a_template_turns_it_off(tmp_path: Path) -> None:
    async with served(tmp_path, "hello") as (client, engine):
        for fields in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
            await ask(client, **fields)
            assert prompt_of(engine).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        await ask(client, chat_template_kwargs={"enable_thinking": True})
        assert prompt_of(engine).endswith("<|im_start|>assistant\n")


async def test_a_thought_goes_back_to_the_template(tmp_path: Path) -> None:
    async with served(tmp_path, "hello") as (client, engine):
        for name in ("reasoning_content", "reasoning"):
            call = {"id": "1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
            said = {"role": "assistant", "content": None, name: "First this.", "tool_calls": [call]}
            await ask(client, messages=[HI, said, {"role": "tool", "tool_call_id": "1", "content": "noon"}])
            assert "<think>\nFirst this.\n</think>" in prompt_of(engine)


async def test_options_that_a_template_reads(tmp_path: Path) -> None:
    async with served(tmp_path, "hello", EFFORT) as (client, engine):
        await ask(client, reasoning_effort="high", verbosity="low")
        assert prompt_of(engine).endswith("hihigh|low")
        await ask(client, documents=[{"title": "Paper", "text": "x"}])
        assert prompt_of(engine).endswith("Paper")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"reasoning_effort": "high"}, "reasoning_effort", "The only value is 'none'"),
        ({"reasoning_effort": "very"}, "reasoning_effort", "'high'"),
        ({"verbosity": "high"}, "verbosity", "reads no 'verbosity'"),
        ({"chat_template_kwargs": {"thinking_budget": 5}}, "chat_template_kwargs", "no option 'thinking_budget'"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "no variable"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs", "no variable"),
        ({"documents": [{"text": "x"}]}, "documents", "no documents"),
        ({"continue_final_message": True}, "continue_final_message", "Only a text of the assistant"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "one of them"),
        ({"reasoning_format": "xml"}, "reasoning_format", "'none'"),
    ],
)
async def test_refusals(tmp_path: Path, fields: dict[str, Any], param: str, words: str) -> None:
    async with served(tmp_path, "hello") as (client, engine):
        named, message = await refusal(client, engine, **fields)
        assert named == param
        assert words in message


async def test_reasoning_effort_none_asks_for_nothing_of_a_model_without_reasoning(tmp_path: Path) -> None:
    async with served(tmp_path, "hello", chat_templates.CHATML) as (client, _):
        assert (await ask(client, reasoning_effort="none", verbosity="medium"))["message"]["content"] == "hello"


async def test_the_generation_prompt(tmp_path: Path) -> None:
    async with served(tmp_path, "hello", chat_templates.CHATML) as (client, engine):
        await ask(client, add_generation_prompt=False)
        assert prompt_of(engine) == "<|im_start|>user\nhi<|im_end|>\n"
        await ask(client, add_generation_prompt=True)
        assert prompt_of(engine).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("parts", [False, True])
async def test_the_last_message_is_continued(tmp_path: Path, parts: bool) -> None:
    async with served(tmp_path, "lo") as (client, engine):
        text = "Hel <|im_end|> l"
        content: Any = [{"type": "text", "text": text}] if parts else text
        messages = [HI, {"role": "assistant", "content": content}]
        choice = await ask(client, messages=messages, continue_final_message=True)
        assert choice["message"]["content"] == "lo"
        assert prompt_of(engine) == f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{text}"


async def test_a_thought_is_continued(tmp_path: Path) -> None:
    async with served(tmp_path, " that.</think>Yes.", chat_templates.CHATML, reasoning_parser="think") as (client, _):
        messages = [HI, {"role": "assistant", "content": "<think>First"}]
        message = (await ask(client, messages=messages, continue_final_message=True))["message"]
        assert (message["reasoning_content"], message["content"]) == ("that.", "Yes.")

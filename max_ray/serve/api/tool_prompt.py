"""Tools for models whose chat template knows none: described in a system message, calls and results as text.

The form is the one that Hermes models were trained on, and many others have seen:

    <tool_call>
    {"name": "f", "arguments": {"a": 1}}
    </tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_INTRODUCTION = (
    "You can call these functions. Each line describes one, with a JSON schema of its arguments:\n{tools}\n"
    "To call a function, answer with nothing but its name and its arguments in this form:\n"
    '<tool_call>\n{{"name": "...", "arguments": {{...}}}}\n</tool_call>'
)

Messages = Sequence[Mapping[str, Any]]


def with_described_tools(messages: Messages, tools: Sequence[Mapping[str, Any]], has_system: bool) -> Messages:
    """The messages with a description of the tools.

    Args:
        messages: As chat templates read them.
        tools: As chat templates read them.
        has_system: Whether the template writes system messages; else the first user message gets the description.
    """
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = _INTRODUCTION.format(tools=lines)
    roles = ("system", "developer") if has_system else ("user",)
    place = next((i for i, message in enumerate(messages) if message["role"] in roles), None)
    if place is None or (has_system and place):
        return [{"role": roles[0], "content": text}, *messages]
    message = messages[place]
    content = message["content"]
    parts = f"{content}\n\n{text}" if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return [*messages[:place], {**message, "content": parts}, *messages[place + 1 :]]


def with_calls_as_text(messages: Messages) -> Messages:
    """The messages with tool calls in the assistant's text, and results in the user's.

    Args:
        messages: As chat templates read them.
    """
    written: list[Mapping[str, Any]] = []
    is_result = False
    for message in messages:
        if message["role"] != "tool":
            is_result = False
            written.append(_as_text(message) if message.get("tool_calls") else message)
            continue
        result = f"<tool_response>\n{_text_of(message['content'])}\n</tool_response>"
        if is_result:  # in one message of the user: many templates want turns to alternate
            result = f"{written.pop()['content']}\n{result}"
        written.append({"role": "user", "content": result})
        is_result = True
    return written


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [
        f'<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": {function["arguments"]}}}\n</tool_call>'
        for function in functions
    ]
    text = _text_of(message.get("content") or "")
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**kept, "content": "\n".join([*([text] if text else []), *calls])}


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")

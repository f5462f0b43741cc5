"""Forms of messages that templates want: tool calls, and a last message that is continued."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from max_ray.errors import InputError

Chat = list[dict[str, Any]]
_END_MARK = "\U000f1a55\U000f1a56"  # stands at the end of a message that is continued; private-use characters
_USER = {"role": "user", "content": "zquser"}
_ARGUMENTS = {"object": {"zqkey": "zqargument"}, "text": '{"zqkey": "zqargument"}'}
_CALL_ID = "zqcall123"


@dataclass(frozen=True)
class CallForm:
    """How a template wants the assistant's tool calls.

    Args:
        arguments: The arguments of a call as an object or as JSON text.
        content: The content of a message that has calls and no text: left out, an empty text, or null.
    """

    arguments: Literal["object", "text"] = "object"
    content: Literal["absent", "empty", "null"] = "absent"


CALL_FORMS = (
    CallForm("object", "absent"),
    CallForm("object", "empty"),
    CallForm("object", "null"),
    CallForm("text", "absent"),
    CallForm("text", "empty"),
    CallForm("text", "null"),
)
"""All forms, the usual ones first."""


def probe_chat(form: CallForm) -> Chat:
    """A question, a tool's call and its result."""
    function = {"name": "zqfunction", "arguments": _ARGUMENTS[form.arguments]}
    call = {"role": "assistant", "tool_calls": [{"id": _CALL_ID, "type": "function", "function": function}]}
    result = {"role": "tool", "content": "zqresult", "tool_call_id": _CALL_ID, "name": "zqname"}
    return [_USER, {**call, **_no_content(form)}, result]


def _no_content(form: CallForm) -> dict[str, Any]:
    return {} if form.content == "absent" else {"content": "" if form.content == "empty" else None}


def with_calls(message: Mapping[str, Any], calls: Sequence[Mapping[str, Any]], form: CallForm) -> dict[str, Any]:
    """A message with tool calls in the form that a template wants."""
    shaped = [{**call, "function": _with_arguments(call["function"], form)} for call in calls]
    if message.get("content"):
        return {**message, "tool_calls": shaped}
    rest = {key: value for key, value in message.items() if key != "content"}
    return {**rest, **_no_content(form), "tool_calls": shaped}


def _with_arguments(function: Mapping[str, Any], form: CallForm) -> dict[str, Any]:
    """A call's function with its arguments as a template wants them. What is no JSON object stays as it is."""
    arguments = function.get("arguments", "{}")
    if form.arguments == "text" and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if form.arguments == "object" and isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = arguments
        arguments = parsed if isinstance(parsed, dict) else arguments
    return {**function, "arguments": arguments}


def with_mark(chat: Chat) -> Chat:
    """The messages with a mark at the end of the last one's text. Raises InputError where it has none."""
    content = chat[-1].get("content") if chat[-1].get("role") == "assistant" else None
    if isinstance(content, str):
        return [*chat[:-1], {**chat[-1], "content": content + _END_MARK}]
    if isinstance(content, list) and content and isinstance(content[-1].get("text"), str):
        last = {**content[-1], "text": content[-1]["text"] + _END_MARK}
        return [*chat[:-1], {**chat[-1], "content": [*content[:-1], last]}]
    raise InputError(
        "Only a text of the assistant can be continued, and the last message is none.", param="continue_final_message"
    )


def until_mark(text: str) -> str:
    """The text up to the mark. Raises InputError where the template has not written it."""
    place = text.rfind(_END_MARK)
    if place < 0:
        raise InputError(
            "This model's chat template does not write the last message as it is, so it cannot be continued.",
            param="continue_final_message",
        )
    return text[:place]

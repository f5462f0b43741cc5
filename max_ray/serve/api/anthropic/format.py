"""The answer as Anthropic tells it: a message object, or the events that make one."""

from __future__ import annotations

import json
from json.encoder import encode_basestring as quote
from typing import Any

from max_ray.interfaces import RequestID
from max_ray.serve.api.choice import ChoiceDelta
from max_ray.serve.api.dialect import DialectFormat
from max_ray.serve.api.generation import Generation
from max_ray.serve.api.objects.anthropic import AnsweredBlock, AnsweredToolUse, MessageObject, MessageUsage, StopReason
from max_ray.serve.api.parts import Part, PartEvent, PartTracker

_PING = b'event: ping\ndata: {"type": "ping"}\n\n'
_DELTAS = {
    "text": '"text_delta", "text": ',
    "reasoning": '"thinking_delta", "thinking": ',
    "tool_call": '"input_json_delta", "partial_json": ',
}


class MessageFormat(DialectFormat):
    """Of one request.

    Args:
        model: The name of the served model.
        generation: Of one choice.
    """

    def __init__(self, model: str, generation: Generation) -> None:
        self._generation = generation
        self._choice = generation.choices[0]
        self._parts = PartTracker()
        self._finish_reason: str | None = None
        self._id, self._model = f"msg_{RequestID()}", model

    @property
    def answer_id(self) -> str:
        return self._id

    def begin(self) -> bytes:
        """The prompt's cached tokens are not known yet: `message_delta` has the final counts."""
        return _event("message_start", message=self._message([], None)) + _PING

    def keep_alive(self) -> bytes:
        return _PING

    def delta(self, delta: ChoiceDelta) -> bytes:
        self._finish_reason = delta.finish_reason or self._finish_reason
        return b"".join(map(_part_event, self._parts.take(delta)))

    def end(self) -> bytes:
        closing = b"".join(map(_part_event, self._parts.close()))
        change = {"stop_reason": self._stop_reason, "stop_sequence": self._choice.stop_string}
        return closing + _event("message_delta", delta=change, usage=self._usage) + _event("message_stop")

    def whole(self) -> MessageObject:
        return self._message([_block(part) for part in self._parts.parts], self._stop_reason)

    def _message(self, content: list[AnsweredBlock], stop_reason: StopReason | None) -> MessageObject:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": self._choice.stop_string,
            "usage": self._usage,
        }

    @property
    def _stop_reason(self) -> StopReason:
        if self._choice.stop_string is not None:
            return "stop_sequence"
        if self._finish_reason == "length":
            limit = self._choice.context.sampling_params.max_new_tokens
            is_at_limit = limit is not None and self._choice.num_tokens >= limit
            return "max_tokens" if is_at_limit else "model_context_window_exceeded"
        return "tool_use" if self._finish_reason == "tool_calls" else "end_turn"

    @property
    def _usage(self) -> MessageUsage:
        """Anthropic counts the prompt's tokens apart by where they came from."""
        usage = self._generation.usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }


def _part_event(event: PartEvent) -> bytes:
    if event.action == "start":
        block = _block(event.part) if event.part.kind != "tool_call" else _call(event.part, {})
        return _event("content_block_start", index=event.index, content_block=block)
    if event.action == "stop":
        return _event("content_block_stop", index=event.index)
    delta = f'{{"type": {_DELTAS[event.part.kind]}{quote(event.text)}}}'
    data = f'{{"type": "content_block_delta", "index": {event.index}, "delta": {delta}}}'
    return f"event: content_block_delta\ndata: {data}\n\n".encode()


def _block(part: Part) -> AnsweredBlock:
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": part.text, "signature": ""}
    if part.kind == "tool_call":
        return _call(part, _arguments(part.text))
    return {"type": "text", "text": part.text, "citations": None}


def _call(part: Part, arguments: dict[str, Any]) -> AnsweredToolUse:
    return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": arguments}


def _arguments(text: str) -> dict[str, Any]:
    """The object of a call's arguments; none where the model's text is no JSON object, as when it was cut off."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n".encode()

"""OpenAI's chat answers with reasoning and tool calls."""

from __future__ import annotations

import json
from json.encoder import encode_basestring as quote
from typing import Any

from max_ray.output_parsers import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    join_events,
)
from max_ray.serve.api.choice import ChoiceDelta, ParsedDelta
from max_ray.serve.api.formats import ChatFormat
from max_ray.serve.api.objects.openai import AnsweredCall, AnswerMessage
from max_ray.serve.api.parsed_choice import joined_texts
from max_ray.serve.api.sse import encode_event


class ParsedChatFormat(ChatFormat):
    """Chunks and answers of one request whose choices have events."""

    def event(self, delta: ChoiceDelta) -> bytes:
        events = _events_of(delta)
        if len(events) == 1 and isinstance(events[0], ContentDelta):
            delta.text = events[0].text
            return super().event(delta)
        return b"".join(map(encode_event, self.chunks(delta)))

    def chunks(self, delta: ChoiceDelta) -> list[str]:
        chunks = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            chunks.append(self._role_chunk(delta.index))
        logprobs = self._logprobs(delta.tokens) if delta.tokens else None
        ids = delta.token_ids or None
        contents = [content for event in _events_of(delta) if (content := _delta(event))]
        for content in contents or ["{}"] * bool(logprobs or ids):
            chunks.append(self._chunk(delta.index, f'"delta": {content}', logprobs, None, ids))
            logprobs = ids = None
        if delta.finish_reason:
            none = None if delta.tokens is None else self._logprobs([])
            chunks.append(self._chunk(delta.index, '"delta": {}', none, delta.finish_reason))
        return chunks

    def _choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        events = join_events(_events_of(choice))
        calls = _calls(events)
        content, reasoning = joined_texts(events)
        content = self._options.prefix + content
        message: AnswerMessage = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return {**super()._choice(choice), "message": message}


def _events_of(delta: ChoiceDelta) -> list[Event]:
    assert isinstance(delta, ParsedDelta), "a choice without a parser"
    return delta.events


def _delta(event: Event) -> str:
    """The JSON text of a chunk's `delta`; empty where there is nothing to tell."""
    if isinstance(event, ContentDelta):
        return f'{{"content": {quote(event.text)}}}'
    if isinstance(event, ReasoningDelta):
        return f'{{"reasoning_content": {quote(event.text)}}}'
    if isinstance(event, ToolCallEnd):
        return ""
    if isinstance(event, ToolCallArguments):
        return f'{{"tool_calls": [{{"index": {event.index}, "function": {{"arguments": {quote(event.text)}}}}}]}}'
    function = {"name": event.name, "arguments": ""}
    call = {"index": event.index, "id": event.id, "type": "function", "function": function}
    return json.dumps({"tool_calls": [call]}, ensure_ascii=False)


def _calls(events: list[Event]) -> list[AnsweredCall]:
    calls: list[AnsweredCall] = []
    for event in events:
        if isinstance(event, ToolCallStart):
            calls.append({"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}})
        elif isinstance(event, ToolCallArguments):
            calls[event.index]["function"]["arguments"] += event.text
    return calls

"""A response object, and the events that make one."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from json.encoder import encode_basestring as quote
from typing import Any

from max_ray.interfaces import RequestID
from max_ray.serve.api.choice import ChoiceDelta
from max_ray.serve.api.dialect import DialectFormat
from max_ray.serve.api.generation import Generation
from max_ray.serve.api.parts import Part, PartEvent, PartKind, PartTracker

_PREFIXES: dict[PartKind, str] = {"text": "msg", "reasoning": "rs", "tool_call": "fc"}
_EVENTS: dict[PartKind, str] = {
    "text": "response.output_text",
    "reasoning": "response.reasoning_text",
    "tool_call": "response.function_call_arguments",
}


class ResponseFormat(DialectFormat):
    """Of one request. A step that ends the reasoning and begins the text counts for the text.

    Args:
        model: The name of the served model.
        generation: Of one choice.
        echoed: The fields of the request that the response repeats.
    """

    def __init__(self, model: str, generation: Generation, echoed: Mapping[str, Any]) -> None:
        self.id = f"resp_{RequestID()}"
        self._generation = generation
        self._choice = generation.choices[0]
        self._num_told_tokens = self._num_reasoning_tokens = 0
        params = self._choice.context.sampling_params
        sampling = {"temperature": params.temperature, "top_p": params.top_p}
        self._head = {"id": self.id, "object": "response", "created_at": int(time.time()), "model": model}
        self.echoed = {**echoed, **sampling, "service_tier": "default"}
        self._parts = PartTracker()
        self._item_ids: list[str] = []
        self._sequence = 0
        self._finish_reason: str | None = None

    @property
    def answer_id(self) -> str:
        return self.id

    def begin(self) -> bytes:
        response = self.response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def delta(self, delta: ChoiceDelta) -> bytes:
        self._finish_reason = delta.finish_reason or self._finish_reason
        events = self._parts.take(delta)
        num_tokens = self._choice.num_tokens
        if self._parts.parts and self._parts.parts[-1].kind == "reasoning":
            self._num_reasoning_tokens += num_tokens - self._num_told_tokens
        self._num_told_tokens = num_tokens
        return b"".join(map(self._part_event, events))

    def end(self) -> bytes:
        closing = b"".join(map(self._part_event, self._parts.close()))
        return closing + self._event(f"response.{self.final_status}", response=self.whole())

    def failure(self, content: Mapping[str, Any]) -> bytes:
        return self._event("response.failed", response=self.failed(content))

    def failed(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The response object of a request that failed. content: OpenAI's error object."""
        error = {"code": "server_error", "message": content["error"]["message"]}
        return {**self.response("failed"), "error": error, "output": self.output("incomplete")}

    def whole(self) -> dict[str, Any]:
        status = self.final_status
        why = {"reason": "max_output_tokens"} if status == "incomplete" else None
        usage = self._generation.usage
        return {
            **self.response(status),
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": why,
            "output": self.output(status),
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    @property
    def final_status(self) -> str:
        """`incomplete` where the limit of tokens ended the answer."""
        return "incomplete" if self._finish_reason == "length" else "completed"

    def response(self, status: str) -> dict[str, Any]:
        """The response object without output, with this status."""
        nothing: dict[str, Any] = {"error": None, "incomplete_details": None, "output": [], "usage": None}
        return {**self._head, "status": status, **nothing, **self.echoed}

    def output(self, status: str) -> list[dict[str, Any]]:
        """The items so far; the last one has this status."""
        last = len(self._parts.parts) - 1
        return [
            self._item(index, part, status if index == last else "completed")
            for index, part in enumerate(self._parts.parts)
        ]

    def _item(self, index: int, part: Part, status: str) -> dict[str, Any]:
        head = {"id": self._item_id(index, part), "status": status}
        if part.kind == "tool_call":
            call = {"call_id": part.call_id, "name": part.name, "arguments": part.text}
            return {**head, "type": "function_call", **call}
        content = [_content(part)] if status != "in_progress" else []
        if part.kind == "reasoning":
            return {**head, "type": "reasoning", "summary": [], "content": content}
        return {**head, "type": "message", "role": "assistant", "content": content}

    def _item_id(self, index: int, part: Part) -> str:
        while len(self._item_ids) <= index:
            self._item_ids.append(f"{_PREFIXES[part.kind]}_{RequestID()}")
        return self._item_ids[index]

    def _part_event(self, event: PartEvent) -> bytes:
        if event.action == "delta":
            return self._delta_event(event)
        part = event.part
        place = {"item_id": self._item_id(event.index, part), "output_index": event.index}
        inside = {**place, "content_index": 0}
        if event.action == "start":
            item = self._item(event.index, part, "in_progress")
            begun = self._event("response.output_item.added", output_index=event.index, item=item)
            if part.kind == "tool_call":
                return begun
            return begun + self._event("response.content_part.added", **inside, part=_content(part))
        if part.kind == "tool_call":
            done = self._event(f"{_EVENTS[part.kind]}.done", **place, name=part.name, arguments=part.text)
        else:
            logprobs: dict[str, Any] = {"logprobs": []} if part.kind == "text" else {}
            done = self._event(f"{_EVENTS[part.kind]}.done", **inside, text=part.text, **logprobs)
            done += self._event("response.content_part.done", **inside, part=_content(part))
        item = self._item(event.index, part, "completed")
        return done + self._event("response.output_item.done", output_index=event.index, item=item)

    def _delta_event(self, event: PartEvent) -> bytes:
        """Nearly every event is one, so it is glued from prepared text."""
        kind = f"{_EVENTS[event.part.kind]}.delta"
        inside = "" if event.part.kind == "tool_call" else '"content_index": 0, '
        if event.part.kind == "text":
            inside += '"logprobs": [], '
        item_id = self._item_id(event.index, event.part)
        data = (
            f'{{"type": "{kind}", "sequence_number": {self._sequence}, "item_id": "{item_id}", '
            f'"output_index": {event.index}, {inside}"delta": {quote(event.text)}}}'
        )
        self._sequence += 1
        return f"event: {kind}\ndata: {data}\n\n".encode()

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = json.dumps({"type": kind, "sequence_number": self._sequence, **fields}, ensure_ascii=False)
        self._sequence += 1
        return f"event: {kind}\ndata: {data}\n\n".encode()


def _content(part: Part) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": part.text}
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}

"""The answer as Ollama tells it: an object, or one JSON object a line.

Lines are ASCII: some clients also end a line at other characters (U+0085, U+2028).
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii as quote
from time import perf_counter
from typing import Any

from max_ray.serve.api.choice import ChoiceDelta
from max_ray.serve.api.dialect import DialectFormat
from max_ray.serve.api.generation import Generation
from max_ray.serve.api.parts import Part, PartEvent, PartTracker

MEDIA_TYPE = "application/x-ndjson"


def timestamp() -> str:
    """The time, as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class Lines(DialectFormat):
    """Of one request.

    Args:
        model: The name of the served model.
        generation: Of one choice.
    """

    media_type = MEDIA_TYPE

    def __init__(self, model: str, generation: Generation) -> None:
        self._generation = generation
        self._parts = PartTracker()
        self._finish_reason: str | None = None
        self._first_at: float | None = None
        self._head = {"model": model, "created_at": timestamp()}
        self._prefix = json.dumps(self._head)[:-1]

    def begin(self) -> bytes:
        return b""

    def delta(self, delta: ChoiceDelta) -> bytes:
        self._first_at = self._first_at or perf_counter()
        self._finish_reason = delta.finish_reason or self._finish_reason
        return b"".join(map(self._line, self._parts.take(delta)))

    def end(self) -> bytes:
        closing = b"".join(map(self._line, self._parts.close()))
        return closing + _encoded({**self._head, **self.content([]), **self._final})

    def whole(self) -> dict[str, Any]:
        return {**self._head, **self.content(self._parts.parts), **self._final}

    @abstractmethod
    def content(self, parts: list[Part]) -> dict[str, Any]:
        """The fields that hold these parts of the answer."""

    @abstractmethod
    def piece(self, kind: str, text: str) -> str:
        """The same for a piece of text or of reasoning, as JSON text without braces."""

    def _line(self, event: PartEvent) -> bytes:
        """Text goes out as it comes; a call when it is complete, for its arguments are an object here."""
        if event.part.kind == "tool_call":
            is_complete = event.action == "stop"
            fields = {**self._head, **self.content([event.part]), "done": False}
            return _encoded(fields) if is_complete else b""
        if event.action != "delta":
            return b""
        return f'{self._prefix}, {self.piece(event.part.kind, event.text)}, "done": false}}\n'.encode()

    @property
    def _final(self) -> dict[str, Any]:
        """Durations in nanoseconds. The prompt's one lasts until the first token, waiting included."""
        now, arrival = perf_counter(), self._generation.arrival
        first = self._first_at or now
        usage = self._generation.usage
        return {
            "done": True,
            "done_reason": "length" if self._finish_reason == "length" else "stop",
            "total_duration": _nanoseconds(now - arrival),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first - arrival),
            "eval_count": usage.completion_tokens,
            "eval_duration": _nanoseconds(now - first),
        }


class ChatLines(Lines):
    """Of `/api/chat`."""

    def content(self, parts: list[Part]) -> dict[str, Any]:
        calls = [
            {"function": {"name": p.name, "arguments": _arguments(p.text)}} for p in parts if p.kind == "tool_call"
        ]
        thinking = "".join(part.text for part in parts if part.kind == "reasoning")
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(part.text for part in parts if part.kind == "text"),
            **({"thinking": thinking} if thinking else {}),
            **({"tool_calls": calls} if calls else {}),
        }
        return {"message": message}

    def piece(self, kind: str, text: str) -> str:
        if kind == "reasoning":
            return f'"message": {{"role": "assistant", "content": "", "thinking": {quote(text)}}}'
        return f'"message": {{"role": "assistant", "content": {quote(text)}}}'


class GenerateLines(Lines):
    """Of `/api/generate`."""

    def content(self, parts: list[Part]) -> dict[str, Any]:
        thinking = "".join(part.text for part in parts if part.kind == "reasoning")
        text = "".join(part.text for part in parts if part.kind == "text")
        return {"response": text, **({"thinking": thinking} if thinking else {})}

    def piece(self, kind: str, text: str) -> str:
        if kind == "reasoning":
            return f'"response": "", "thinking": {quote(text)}'
        return f'"response": {quote(text)}'


def loaded(model: str, is_chat: bool) -> dict[str, Any]:
    """The answer to a request that only wants the model loaded."""
    content: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if is_chat else {"response": ""}
    return {"model": model, "created_at": timestamp(), **content, "done": True, "done_reason": "load"}


def _arguments(text: str) -> dict[str, Any]:
    """The object of a call's arguments; none where the model's text is no JSON object, as when it was cut off."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _encoded(fields: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(fields)}\n".encode()


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))

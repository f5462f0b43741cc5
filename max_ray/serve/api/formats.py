"""From pieces of text to OpenAI's answer objects: whole ones as dicts, chunks as JSON text.

A chunk is glued from prepared text: only what changes is serialized, for the stream's cost is this and one write.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from json.encoder import encode_basestring as quote
from typing import Any

from max_ray.serve.api.choice import ChoiceDelta, TokenEntry
from max_ray.serve.api.generation import Usage
from max_ray.serve.api.sse import encode_event
from max_ray.tokenization.token_bytes import TokenText

# JSON has no infinity; OpenAI writes this for tokens that cannot come.
_LOWEST = -9999.0


class AnswerFormat(ABC):
    """Chunks and answers of one request."""

    object_name: str
    chunk_object_name: str
    before_text: str
    after_text: str

    def __init__(self, answer_id: str, created: int, model: str, tokens: TokenText, *, include_usage: bool) -> None:
        self._head = {"id": answer_id, "created": created, "model": model}
        self._tokens = tokens
        shared = json.dumps({"object": self.chunk_object_name, **self._head}, ensure_ascii=False)[:-1]
        self._prefix = f'{shared}, "choices": ['
        self._suffix = '], "usage": null}' if include_usage else "]}"
        self._heads: dict[int, str] = {}
        self._tail = f'{self.after_text}, "logprobs": null, "finish_reason": null}}{self._suffix}\n\n'

    def usage_chunk(self, usage: Usage) -> str:
        """The last chunk, when `stream_options.include_usage` is set."""
        return f'{self._prefix}], "usage": {json.dumps(usage.as_dict())}}}'

    def answer(self, choices: Sequence[ChoiceDelta], usage: Usage) -> dict[str, Any]:
        """The whole answer; `choices` hold all their text, in order."""
        return {
            "object": self.object_name,
            **self._head,
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage.as_dict(),
        }

    def event(self, delta: ChoiceDelta) -> bytes:
        """The chunks of a delta as server-sent events. Mere text, as nearly every delta is, goes between prepared ends,
        once the choice has begun."""
        head = self._heads.get(delta.index)
        if head is not None and delta.tokens is None and delta.finish_reason is None:
            return f"{head}{quote(delta.text)}{self._tail}".encode()
        self._heads[delta.index] = f'data: {self._prefix}{{"index": {delta.index}, {self.before_text}'
        return b"".join(map(encode_event, self.chunks(delta)))

    @abstractmethod
    def chunks(self, delta: ChoiceDelta) -> list[str]:
        """The chunks that tell of a delta."""

    @abstractmethod
    def _choice(self, choice: ChoiceDelta) -> dict[str, Any]: ...

    def _chunk(self, index: int, content: str, logprobs: Any, finish_reason: str | None) -> str:
        logs = "null" if logprobs is None else json.dumps(logprobs, ensure_ascii=False)
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        choice = f'{{"index": {index}, {content}, "logprobs": {logs}, "finish_reason": {reason}}}'
        return self._prefix + choice + self._suffix


class CompletionFormat(AnswerFormat):
    object_name = chunk_object_name = "text_completion"
    before_text = '"text": '
    after_text = ""

    def chunks(self, delta: ChoiceDelta) -> list[str]:
        return [self._chunk(delta.index, f'"text": {quote(delta.text)}', self._logprobs(delta), delta.finish_reason)]

    def _choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        """OpenAI's four parallel lists, empty for an answer without tokens; None where they were not asked for."""
        if delta.tokens is None:
            return None
        entries = [(entry.token, entry.log_probabilities) for entry in delta.tokens]
        return {
            "tokens": [self._tokens.text_of(token) for token, _ in entries],
            "token_logprobs": [None if log is None else finite(log.log_probability) for _, log in entries],
            "top_logprobs": [self._top(entry) for entry in delta.tokens],
            "text_offset": [entry.offset for entry in delta.tokens],
        }

    def _top(self, token_entry: TokenEntry) -> dict[str, float] | None:
        """The most likely tokens, and the chosen one. Of tokens that print alike the most likely one counts."""
        log = token_entry.log_probabilities
        if log is None:
            return None
        top: dict[str, float] = {}
        for token, log_probability in [*log.top, (token_entry.token, log.log_probability)]:
            text, value = self._tokens.text_of(token), finite(log_probability)
            top[text] = max(value, top.get(text, _LOWEST))
        return top


class ChatFormat(AnswerFormat):
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    before_text = '"delta": {"content": '
    after_text = "}"

    def __init__(self, answer_id: str, created: int, model: str, tokens: TokenText, *, include_usage: bool) -> None:
        super().__init__(answer_id, created, model, tokens, include_usage=include_usage)
        self._begun: set[int] = set()

    def chunks(self, delta: ChoiceDelta) -> list[str]:
        """The role comes first, in a chunk of its own, and the end last."""
        chunks = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            chunks.append(self._chunk(delta.index, '"delta": {"role": "assistant", "content": ""}', None, None))
        if delta.text or delta.tokens:
            content = f'"delta": {{"content": {quote(delta.text)}}}'
            chunks.append(self._chunk(delta.index, content, self._logprobs(delta.tokens), None))
        if delta.finish_reason:
            none = None if delta.tokens is None else self._logprobs([])
            chunks.append(self._chunk(delta.index, '"delta": {}', none, delta.finish_reason))
        return chunks

    def _choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[TokenEntry] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        return {"content": [self._token(entry) for entry in tokens], "refusal": None}

    def _token(self, token_entry: TokenEntry) -> dict[str, Any]:
        log = token_entry.log_probabilities
        assert log is not None, "chat reports no prompt tokens"
        top = [self._one(other, value) for other, value in log.top]
        return {**self._one(token_entry.token, log.log_probability), "top_logprobs": top}

    def _one(self, token: int, log_probability: float) -> dict[str, Any]:
        return {
            "token": self._tokens.text_of(token),
            "logprob": finite(log_probability),
            "bytes": list(self._tokens.bytes_of(token)),
        }


def finite(value: float) -> float:
    """A log probability that JSON can hold."""
    return value if value > _LOWEST else _LOWEST  # also for NaN, which a row without any allowed token gives

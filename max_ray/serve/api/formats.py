"""From pieces of text to OpenAI's answer objects: whole ones as dicts, chunks as JSON text.

A chunk is glued from prepared text: only what changes is serialized, for the stream's cost is this and one write.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring as quote
from typing import Any

from max_ray.serve.api.choice import ChoiceDelta, TokenEntry
from max_ray.serve.api.generation import Usage
from max_ray.serve.api.objects.openai import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from max_ray.serve.api.sse import encode_event
from max_ray.tokenization.token_bytes import TokenText

# JSON has no infinity; OpenAI writes this for tokens that cannot come.
_LOWEST = -9999.0


@dataclass(frozen=True, kw_only=True)
class FormatOptions:
    """What an answer has besides its text.

    Args:
        includes_usage: Whether a stream ends with the usage.
        usage: Gives the usage so far, for every chunk of a stream; None: only the end has it.
        timings: Gives the timings so far, for every chunk and the whole answer; None: without.
        prompt_ids: Gives the ids of a choice's prompt by the choice's number; None: without ids.
        names_tokens_by_id: Whether log probabilities name tokens `token_id:5`.
        prefix: What the text of a chat's answer begins with.
    """

    includes_usage: bool = False
    usage: Callable[[], Usage] | None = None
    timings: Callable[[], Mapping[str, float]] | None = None
    prompt_ids: Callable[[int], list[int]] | None = None
    names_tokens_by_id: bool = False
    prefix: str = ""


class AnswerFormat(ABC):
    """Chunks and answers of one request."""

    object_name: str
    chunk_object_name: str
    before_text: str
    after_text: str

    def __init__(self, answer_id: str, created: int, model: str, tokens: TokenText, options: FormatOptions) -> None:
        self._options = options
        self._name = _name_by_id if options.names_tokens_by_id else tokens.text_of
        self._is_plain = (options.usage, options.timings, options.prompt_ids) == (None, None, None)
        self._head = {"id": answer_id, "created": created, "model": model}
        self._tokens = tokens
        shared = json.dumps({"object": self.chunk_object_name, **self._head}, ensure_ascii=False)[:-1]
        self._prefix = f'{shared}, "choices": ['
        self._suffix = '], "usage": null}' if options.includes_usage else "]}"
        self._heads: dict[int, str] = {}
        self._begun: set[int] = set()  # choices that have a chunk
        self._tail = f'{self.after_text}, "logprobs": null, "finish_reason": null}}{self._suffix}\n\n'

    def usage_chunk(self, usage: Usage) -> str:
        """The last chunk, when `stream_options.include_usage` is set."""
        return f'{self._prefix}], "usage": {json.dumps(usage.as_dict())}{self._timings_text()}}}'

    def answer(self, choices: Sequence[ChoiceDelta], usage: Usage) -> dict[str, Any]:
        """The whole answer; `choices` hold all their text, in order."""
        return {
            "object": self.object_name,
            **self._head,
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage.as_dict(),
            **({} if self._options.timings is None else {"timings": self._options.timings()}),
        }

    def event(self, delta: ChoiceDelta) -> bytes:
        """The chunks of a delta as server-sent events. Mere text, as nearly every delta is, goes between prepared ends,
        once the choice has begun."""
        head = self._heads.get(delta.index)
        if head is not None and delta.tokens is None and delta.finish_reason is None:
            return f"{head}{quote(delta.text)}{self._tail}".encode()
        if self._is_plain:
            self._heads[delta.index] = f'data: {self._prefix}{{"index": {delta.index}, {self.before_text}'
        return b"".join(map(encode_event, self.chunks(delta)))

    @abstractmethod
    def chunks(self, delta: ChoiceDelta) -> list[str]:
        """The chunks that tell of a delta."""

    def _ids_of(self, choice: ChoiceDelta, *, with_prompt: bool = False) -> dict[str, Any]:
        """The fields with the ids of a choice's tokens, where they are asked for."""
        prompt_ids = self._options.prompt_ids
        if prompt_ids is None:
            return {}
        prompt = {"prompt_token_ids": prompt_ids(choice.index)} if with_prompt else {}
        return {**prompt, "token_ids": choice.token_ids}

    @abstractmethod
    def _choice(self, choice: ChoiceDelta) -> dict[str, Any]: ...

    def _chunk(
        self,
        index: int,
        content: str,
        logprobs: Any,
        finish_reason: str | None,
        token_ids: Sequence[int] | None = None,
        more: str = "",
    ) -> str:
        """One chunk. `content` and `more` are JSON text of fields: of the choice, and of the chunk (with commas)."""
        logs = "null" if logprobs is None else json.dumps(logprobs, ensure_ascii=False)
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        ids = "" if token_ids is None else f', "token_ids": {json.dumps(token_ids)}'
        choice = f'{{"index": {index}, {content}, "logprobs": {logs}, "finish_reason": {reason}{ids}}}'
        return self._prefix + choice + (self._suffix if self._is_plain else self._end_of_chunk(more))

    def _end_of_chunk(self, more: str) -> str:
        usage = self._options.usage
        told = f', "usage": {json.dumps(usage().as_dict())}' if usage is not None else self._suffix[1:-1]
        return f"]{told}{self._timings_text()}{more}}}"

    def _timings_text(self) -> str:
        timings = self._options.timings
        return "" if timings is None else f', "timings": {json.dumps(timings())}'


class CompletionFormat(AnswerFormat):
    object_name = chunk_object_name = "text_completion"
    before_text = '"text": '
    after_text = ""

    def chunks(self, delta: ChoiceDelta) -> list[str]:
        content = f'"text": {quote(delta.text)}'
        prompt_ids = self._options.prompt_ids
        if prompt_ids is not None and delta.index not in self._begun:
            self._begun.add(delta.index)
            content += f', "prompt_token_ids": {json.dumps(prompt_ids(delta.index))}'
        return [self._chunk(delta.index, content, self._logprobs(delta), delta.finish_reason, delta.token_ids)]

    def _choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.finish_reason,
            **self._ids_of(choice, with_prompt=True),
        }

    def _logprobs(self, delta: ChoiceDelta) -> CompletionLogprobs | None:
        """OpenAI's four parallel lists, empty for an answer without tokens; None where they were not asked for."""
        if delta.tokens is None:
            return None
        entries = [(entry.token, entry.log_probabilities) for entry in delta.tokens]
        return {
            "tokens": [self._name(token) for token, _ in entries],
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
            text, value = self._name(token), finite(log_probability)
            top[text] = max(value, top.get(text, _LOWEST))
        return top


class ChatFormat(AnswerFormat):
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    before_text = '"delta": {"content": '
    after_text = "}"

    def chunks(self, delta: ChoiceDelta) -> list[str]:
        """The role comes first, in a chunk of its own, and the end last."""
        chunks = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            chunks.append(self._role_chunk(delta.index))
        if delta.text or delta.tokens or delta.token_ids:
            content = f'"delta": {{"content": {quote(delta.text)}}}'
            chunks.append(self._chunk(delta.index, content, self._logprobs(delta.tokens), None, delta.token_ids))
        if delta.finish_reason:
            none = None if delta.tokens is None else self._logprobs([])
            chunks.append(self._chunk(delta.index, '"delta": {}', none, delta.finish_reason))
        return chunks

    def answer(self, choices: Sequence[ChoiceDelta], usage: Usage) -> dict[str, Any]:
        prompt_ids = self._options.prompt_ids
        ids = {} if prompt_ids is None else {"prompt_token_ids": prompt_ids(choices[0].index)}
        return {**super().answer(choices, usage), **ids}

    def _role_chunk(self, index: int) -> str:
        prompt_ids = self._options.prompt_ids
        more = "" if prompt_ids is None else f', "prompt_token_ids": {json.dumps(prompt_ids(index))}'
        content = f'"delta": {{"role": "assistant", "content": {quote(self._options.prefix)}}}'
        return self._chunk(index, content, None, None, more=more)

    def _choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": self._options.prefix + choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish_reason,
            **self._ids_of(choice),
        }

    def _logprobs(self, tokens: Sequence[TokenEntry] | None) -> ChatLogprobs | None:
        if tokens is None:
            return None
        return {"content": [self._token(entry) for entry in tokens], "refusal": None}

    def _token(self, token_entry: TokenEntry) -> TokenLogprob:
        log = token_entry.log_probabilities
        assert log is not None, "chat reports no prompt tokens"
        top = [self._one(other, value) for other, value in log.top]
        return {**self._one(token_entry.token, log.log_probability), "top_logprobs": top}

    def _one(self, token: int, log_probability: float) -> TopLogprob:
        return {
            "token": self._name(token),
            "logprob": finite(log_probability),
            "bytes": list(self._tokens.bytes_of(token)),
        }


def _name_by_id(token: int) -> str:
    return f"token_id:{token}"


def finite(value: float) -> float:
    """A log probability that JSON can hold."""
    return value if value > _LOWEST else _LOWEST  # also for NaN, which a row without any allowed token gives

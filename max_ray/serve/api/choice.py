"""One choice's way from tokens to text: `ChoiceDelta`s out of what the steps of one context give.

A piece of text goes out when it is certain that no stop string begins in it. A token's log probabilities go out when
its place in the text is certain, and that the place is before a stop string.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterable, Set
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import NamedTuple

from max_ray.errors import WorkerGroupError
from max_ray.interfaces import GenerationStatus, LogProbabilities, TextContext, TextGenerationOutput
from max_ray.output_parsers import Event
from max_ray.serve.api.extension_fields import TextOptions
from max_ray.serve.api.openai import GenerationJob
from max_ray.tokenization.detokenizer import REPLACEMENT
from max_ray.tokenization.token_bytes import TokenText, token_text_of
from max_ray.tokenization.tokenizer import TextTokenizer

_PLAIN = TextOptions()
_FINISH_REASONS = {GenerationStatus.END_OF_SEQUENCE: "stop", GenerationStatus.MAXIMUM_LENGTH: "length"}


class TokenEntry(NamedTuple):
    """A token of a choice's text.

    log_probabilities: None for the first token of a prompt, which nothing precedes.
    offset: characters of the text before the one in which the token's text begins.
    """

    token: int
    log_probabilities: LogProbabilities | None
    offset: int


@dataclass(slots=True)
class ChoiceDelta:
    """What one choice gained. `tokens`: None when log probabilities were not asked for. They are those of the text:
    without a stop or end-of-sequence token, and without tokens whose text a stop string has cut off. `token_ids`: all
    tokens since the last delta; None when they were not asked for."""

    index: int
    text: str
    tokens: list[TokenEntry] | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


@dataclass(slots=True)
class ParsedDelta(ChoiceDelta):
    """What one choice with a parser gained. `events`: what the parser has read; `text` is empty."""

    events: list[Event] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PromptEcho:
    """What `echo` gives back of a prompt, once for all its choices.

    offsets: of the prompt's tokens; empty when they were not asked for.
    is_given: the prompt was a text, and is given back as it was; else the text is that of the tokens, up to a
    character that they do not complete.
    """

    text: str
    offsets: list[int]
    is_given: bool

    @classmethod
    def of(cls, prompt: str | None, ids: list[int], tokenizer: TextTokenizer, *, with_offsets: bool) -> PromptEcho:
        """prompt: the text that `ids` come from, None where ids were sent."""
        tokens = token_text_of(tokenizer)
        if not with_offsets:
            text = tokenizer.decode_ids(ids, True) if prompt is None else prompt
            if prompt is not None or REPLACEMENT not in text:
                return cls(text, [], prompt is not None)
        text, offsets = _located(tokens, ids)
        if prompt is not None and prompt != text:
            text, offsets = prompt, _offsets_in(prompt, ids, offsets, tokens)
        return cls(text, offsets, prompt is not None)


class Choice:
    """One context's way from tokens to text. echo: what the text starts with. shown: special tokens in the text."""

    def __init__(
        self,
        index: int,
        context: TextContext,
        tokenizer: TextTokenizer,
        job: GenerationJob,
        echo: PromptEcho | None = None,
        shown: Set[int] = frozenset(),
    ) -> None:
        self.index = index
        self.context = context
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.stream: AsyncIterator[TextGenerationOutput] | None = None
        self.first_token_time = 0.0
        self.last_token_time = 0.0
        self.log_probability = 0.0
        self._options = options = job.text_options
        self._shown = shown = tokenizer.special_ids if options.shows_special else shown
        self._token_ids: list[int] = []
        self._time_limit = None if options.time_limit_s is None else _TimeLimit(options.time_limit_s)
        self._discard = job.discard_output
        self._echo = echo
        self.prompt_entries: list[LogProbabilities | None] = []
        self._num_top = job.logprobs or 0
        self._tokens = token_text_of(tokenizer)
        self._detokenizer = self._tokens.detokenizer(context.tokens.prompt, shown)
        self._matcher = self._tokens.stop_matcher(context.sampling_params.stop, includes_stop=options.includes_stop)
        self._log = None if job.logprobs is None else _TokenLog(0 if echo is None else len(echo.text))
        self._length = 0  # characters given out
        unsettled = self._detokenizer.num_unsettled
        self._foreign = 0 if echo is not None and not echo.is_given else unsettled
        self._is_plain = not (
            job.discard_output
            or echo
            or context.log_probabilities is not None
            or context.sampling_params.stop
            or unsettled
            or options != _PLAIN
        )

    def empty_delta(self) -> ChoiceDelta:
        """A delta of this choice to put others together in."""
        return ChoiceDelta(self.index, "")

    @property
    def echo(self) -> PromptEcho | None:
        """What the text will start with, until it has begun."""
        return self._echo

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text."""
        return self._matcher.matched

    def feed(self, output: TextGenerationOutput) -> ChoiceDelta | None:
        """Takes what a step gave; None when there is nothing to tell yet."""
        if self._is_plain and output.final_status is GenerationStatus.ACTIVE:
            return self._feed_plain(output)
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.prompt_entries += output.prompt_log_probabilities or []
        delta = ChoiceDelta(self.index, "", None if self._log is None else [])
        if self._echo is not None and output.tokens:
            self._give_prompt(delta, self._echo)
        if not self._discard:
            self._give_tokens(delta, output)
        if output.is_done and self.finish_reason is None:
            self._end(delta, output)
        if self._time_limit is not None and self.finish_reason is None and self._time_limit.is_over(delta.text):
            self._flush(delta)
            delta.text += self._matcher.flush() if self._matcher.matched is None else ""
            self.finish_reason = "length"
        self._length += len(delta.text)
        if self._log is not None and delta.tokens is not None:
            delta.tokens += self._log.take(self._certain_length())
        delta.finish_reason = self.finish_reason
        if not (delta.text or delta.tokens or delta.finish_reason):
            return None
        if self._options.gives_token_ids:
            delta.token_ids, self._token_ids = self._token_ids, []
        return delta

    def _feed_plain(self, output: TextGenerationOutput) -> ChoiceDelta | None:
        """`feed` for what nearly every step is: tokens, and nothing else to look at or to tell."""
        self.num_cached_tokens = output.num_cached_tokens
        self.num_tokens += len(output.tokens)
        text = self._detokenizer.push(output.tokens)
        return ChoiceDelta(self.index, text) if text else None

    def _give_prompt(self, delta: ChoiceDelta, echo: PromptEcho) -> None:
        """The prompt goes out with the first token: by then all its log probabilities are known."""
        delta.text, self._echo = echo.text, None
        if delta.tokens is not None:
            prompt = self.context.tokens.prompt.tolist()
            assert len(self.prompt_entries) == len(prompt), (
                f"{len(self.prompt_entries)} log probabilities for {len(prompt)} prompt tokens"
            )
            entries = [entry and self._cut(entry) for entry in self.prompt_entries]
            delta.tokens += map(TokenEntry, prompt, entries, echo.offsets)

    def _give_tokens(self, delta: ChoiceDelta, output: TextGenerationOutput) -> None:
        ended_by_token = output.final_status is GenerationStatus.END_OF_SEQUENCE
        num_hidden = ended_by_token and not self._options.includes_stop
        for position, token in enumerate(output.tokens[: len(output.tokens) - num_hidden]):
            self._count(token, output, position)
            delta.text += self._match(self._text_of(token, output.log_probabilities, position))
            if self._tokens.is_special(token) and token not in self._shown:
                delta.text += self._match_special(token)
            if self._matcher.matched is not None:
                self.finish_reason = "stop"
                return
        if num_hidden:
            self._count(output.tokens[-1], output, len(output.tokens) - 1)

    def _count(self, token: int, output: TextGenerationOutput, position: int) -> None:
        self.num_tokens += 1
        self._token_ids.append(token)
        if output.log_probabilities is not None:
            self.log_probability += output.log_probabilities[position].log_probability

    def _text_of(self, token: int, entries: list[LogProbabilities] | None, position: int) -> str:
        if self._log is None:
            return self._without_foreign(self._detokenizer.push([token]))
        assert entries is not None, "log probabilities were asked for and did not come"
        text, places = self._detokenizer.locate(token)
        text = self._without_foreign(text)
        self._log.add(token, self._cut(entries[position]), places)
        return text

    def _cut(self, entry: LogProbabilities) -> LogProbabilities:
        """Without alternatives that were asked for of the prompt alone."""
        return entry if len(entry.top) <= self._num_top else replace(entry, top=entry.top[: self._num_top])

    def _without_foreign(self, text: str) -> str:
        """The answer's text: without what stands for bytes of the prompt that never became a character."""
        if not self._foreign or not text:
            return text
        num_replaced = len(text) - len(text.lstrip(REPLACEMENT))
        foreign, self._foreign = min(self._foreign, num_replaced), 0
        if self._log is not None:
            self._log.start -= foreign
        return text[foreign:]

    def _match(self, text: str) -> str:
        """Stop strings count only after `min_tokens` tokens."""
        return self._matcher.push(text) if self._is_armed and self._matcher.matched is None else text

    def _match_special(self, token: int) -> str:
        return self._matcher.push_special(self._tokens.text_of(token)) if self._is_armed else ""

    @property
    def _is_armed(self) -> bool:
        return self.num_tokens > self.context.sampling_params.min_new_tokens

    def _certain_length(self) -> int | None:
        """Characters that no stop string will cut off; None for all."""
        is_cut = self._matcher.matched is not None
        is_open = bool(self.context.sampling_params.stop) and self.finish_reason is None
        return self._length if is_cut or is_open else None

    def _end(self, delta: ChoiceDelta, output: TextGenerationOutput) -> None:
        if output.final_status not in _FINISH_REASONS:
            raise WorkerGroupError("The request was cancelled by the server. Send it again.")
        self._flush(delta)
        if output.final_status is GenerationStatus.END_OF_SEQUENCE and not self._discard:
            self._end_with_token(delta, output.tokens[-1])
        if self._matcher.matched is not None:
            self.finish_reason = "stop"
            return
        delta.text += self._matcher.flush()
        self.finish_reason = "length" if self._discard else _FINISH_REASONS[output.final_status]

    def _flush(self, delta: ChoiceDelta) -> None:
        """Takes the bytes that never became a character."""
        text, places = self._detokenizer.flush_located()
        delta.text += self._match(self._without_foreign(text))
        if self._log is not None:
            self._log.place(places)

    def _end_with_token(self, delta: ChoiceDelta, token: int) -> None:
        """A stop string may end with the name of the token that ends the sequence."""
        is_shown = self._options.includes_stop or token in self._shown
        if self._matcher.matched is None and self._tokens.is_special(token) and not is_shown:
            delta.text += self._match_special(token)


class _TimeLimit:
    """Of a text that has begun: it ends after the time, once it has a line break."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._begun_at: float | None = None
        self._has_line = False

    def is_over(self, text: str) -> bool:
        """Whether the text ends now, behind `text`."""
        if self._begun_at is None:
            self._begun_at = perf_counter()
        self._has_line = self._has_line or "\n" in text
        return self._has_line and perf_counter() - self._begun_at >= self._seconds


class _TokenLog:
    """Tokens and their log probabilities, until their place in the text is certain and before any stop string.

    start: where the text of a detokenizer begins in the choice's text.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self._entries: deque[tuple[int, LogProbabilities]] = deque()
        self._offsets: deque[int] = deque()
        self._least = start

    def add(self, token: int, entry: LogProbabilities, places: Iterable[int]) -> None:
        self._entries.append((token, entry))
        self.place(places)

    def place(self, places: Iterable[int]) -> None:
        """Places of the first tokens that have none, in the detokenizer's text."""
        self._offsets += [max(self._least, self.start + place) for place in places]

    def take(self, length: int | None) -> list[TokenEntry]:
        """The tokens with places before `length`, None for all with places."""
        taken = []
        while self._offsets and (length is None or self._offsets[0] < length):
            token, entry = self._entries.popleft()
            taken.append(TokenEntry(token, entry, self._offsets.popleft()))
        return taken


def _located(tokens: TokenText, ids: list[int]) -> tuple[str, list[int]]:
    """The text of a prompt's tokens, up to a character that they do not complete, and where each one begins in it."""
    detokenizer = tokens.detokenizer()
    pieces: list[str] = []
    offsets: list[int] = []
    for token in ids:
        piece, places = detokenizer.locate(token)
        pieces.append(piece)
        offsets += places
    text = "".join(pieces)
    return text, offsets + [len(text)] * (len(ids) - len(offsets))


def _offsets_in(prompt: str, ids: list[int], offsets: list[int], tokens: TokenText) -> list[int]:
    """Offsets in a prompt as it was written, in which special tokens may show. Where a tokenizer changes a text (to
    lower case, ...), they count the characters of the tokens, and stay within the prompt."""
    shown = 0
    result = []
    for token, offset in zip(ids, offsets, strict=True):
        place = min(offset + shown, len(prompt))
        result.append(place)
        if tokens.is_special(token) and prompt.startswith(name := tokens.text_of(token), place):
            shown += len(name)
    return result

"""One request's generations, from contexts to pieces of text, for every way in (HTTP, handle, streamed or not).

    GenerationJob -> contexts (one a choice) -> engine streams -> ChoiceDelta: text, log probabilities, the end

A choice ends when its context is done or a stop string is completed; whatever else happens, `close` cancels the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

from deployments.engine import Engine
from deployments.openai import GenerationJob
from max_ray.detokenizer import IncrementalDetokenizer, StopStringMatcher
from max_ray.errors import InputError, WorkerGroupError
from max_ray.interfaces import (
    GenerationStatus,
    LogProbabilities,
    PromptImage,
    RequestID,
    TextContext,
    TextGenerationOutput,
    TextGenerationRequest,
)
from max_ray.token_text import token_text_of
from max_ray.tokenizer import INLINE_CHARACTERS, TextTokenizer

_FINISH_REASONS = {GenerationStatus.END_OF_SEQUENCE: "stop", GenerationStatus.MAXIMUM_LENGTH: "length"}
_HTTP_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}

# A token and its log probabilities; None for the first token of a prompt, which nothing precedes.
TokenEntry = tuple[int, LogProbabilities | None]


@dataclass(slots=True)
class ChoiceDelta:
    """What one choice gained. `tokens` is filled when log probabilities were asked for; a stop or end-of-sequence
    token is not in it, as it is not in the text."""

    index: int
    text: str
    tokens: list[TokenEntry] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request: each prompt once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Choice:
    """One context's way from tokens to text."""

    def __init__(self, index: int, context: TextContext, tokenizer: TextTokenizer, job: GenerationJob) -> None:
        self.index = index
        self.context = context
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.stream: AsyncIterator[TextGenerationOutput] | None = None
        self.last_token_time = 0.0
        self._discard = job.discard_output
        self._with_log_probabilities = job.logprobs is not None
        self._echo: str | None = None
        self._prompt_entries: list[LogProbabilities | None] = []
        self._detokenizer = IncrementalDetokenizer(
            partial(tokenizer.decode_ids, skip_special_tokens=True), token_text_of(tokenizer).whole_text_of
        )
        self._is_plain = not (
            job.discard_output or job.echo or job.logprobs is not None or context.sampling_params.stop
        )
        self._matcher = StopStringMatcher(context.sampling_params.stop)

    def echo(self, prompt_text: str) -> None:
        """The text starts with the prompt's."""
        self._echo = prompt_text

    def feed(self, output: TextGenerationOutput) -> ChoiceDelta | None:
        """Takes what a step gave; None when there is nothing to tell yet."""
        if self._is_plain and output.final_status is GenerationStatus.ACTIVE:
            return self._feed_plain(output)
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self._prompt_entries += output.prompt_log_probabilities or []
        delta = ChoiceDelta(self.index, "")
        if self._echo is not None and output.tokens:
            self._give_prompt(delta)
        if not self._discard:
            self._give_tokens(delta, output)
        if output.is_done and self.finish_reason is None:
            self._end(delta, output.final_status)
        delta.finish_reason = self.finish_reason
        return delta if delta.text or delta.tokens or delta.finish_reason else None

    def _feed_plain(self, output: TextGenerationOutput) -> ChoiceDelta | None:
        """`feed` for what nearly every step is: tokens, and nothing else to look at or to tell."""
        self.num_cached_tokens = output.num_cached_tokens
        self.num_tokens += len(output.tokens)
        text = self._detokenizer.push(output.tokens)
        return ChoiceDelta(self.index, text) if text else None

    def _give_prompt(self, delta: ChoiceDelta) -> None:
        """The prompt goes out with the first token: by then all its log probabilities are known."""
        assert self._echo is not None
        delta.text, self._echo = self._echo, None
        if self._with_log_probabilities:
            prompt = self.context.tokens.prompt.tolist()
            assert len(self._prompt_entries) == len(prompt), (
                f"{len(self._prompt_entries)} log probabilities for {len(prompt)} prompt tokens"
            )
            delta.tokens += zip(prompt, self._prompt_entries, strict=True)

    def _give_tokens(self, delta: ChoiceDelta, output: TextGenerationOutput) -> None:
        ended_by_token = output.final_status is GenerationStatus.END_OF_SEQUENCE
        num_visible = len(output.tokens) - ended_by_token
        for position, token in enumerate(output.tokens):
            self.num_tokens += 1
            if position == num_visible:
                break
            if self._with_log_probabilities:
                assert output.log_probabilities is not None, "log probabilities were asked for and did not come"
                delta.tokens.append((token, output.log_probabilities[position]))
            delta.text += self._match(self._detokenizer.push([token]))
            if self._matcher.matched is not None:
                self.finish_reason = "stop"
                break

    def _match(self, text: str) -> str:
        """Stop strings count only after `min_tokens` tokens."""
        armed = self.num_tokens > self.context.sampling_params.min_new_tokens
        return self._matcher.push(text) if armed else text

    def _end(self, delta: ChoiceDelta, status: GenerationStatus) -> None:
        if status not in _FINISH_REASONS:
            raise WorkerGroupError("The request was cancelled by the server. Send it again.")
        delta.text += self._match(self._detokenizer.flush())
        if self._matcher.matched is not None:
            self.finish_reason = "stop"
            return
        delta.text += self._matcher.flush()
        self.finish_reason = "length" if self._discard else _FINISH_REASONS[status]


class Generation:
    """All choices of one request. `prepare`, `start`, iterate `deltas`, and always `close`."""

    def __init__(self, engine: Engine, choices: list[Choice], n: int, arrival: float) -> None:
        self.choices = choices
        self._engine = engine
        self._n = n
        self._arrival = arrival

    @classmethod
    async def prepare(cls, engine: Engine, job: GenerationJob, arrival: float | None = None) -> Generation:
        """Tokenizes and checks everything. `arrival`: perf_counter() when the request came. Raises InputError."""
        choices: list[Choice] = []
        prompts: Sequence[str | list[int] | None] = job.prompts or [None]
        try:
            for prompt in prompts:
                choices += await _choices_of(engine, job, prompt, len(choices))
                await asyncio.sleep(0)
        except InputError as error:
            names = _HTTP_NAMES | ({"prompt": "messages"} if job.messages else {})
            error.param = names.get(error.param or "", error.param)
            raise
        return cls(engine, choices, job.n, perf_counter() if arrival is None else arrival)

    def start(self) -> None:
        """Submits every choice, or none: each says how many come behind it. Raises QueueFullError,
        InsufficientBlocksError, and InputError for more choices than the server could ever take at once."""
        try:
            for num_left, choice in zip(reversed(range(len(self.choices))), self.choices, strict=True):
                choice.context.num_siblings = num_left
                choice.stream = self._engine.submit(choice.context)
        except InputError as error:
            self.close()
            error.param = "prompt" if error.param == "n" and self._n == 1 else error.param
            raise
        except BaseException:
            self.close()
            raise
        self._engine.metrics.prompt_tokens += sum(c.context.tokens.prompt_length for c in self.choices)

    def deltas(self) -> AsyncIterator[list[ChoiceDelta]]:
        """What the choices gain; those that gain together come together. Raises WorkerGroupError."""
        return self._merged() if len(self.choices) > 1 else self._follow(self.choices[0])

    def close(self) -> None:
        """Cancels what still runs. Idempotent."""
        for choice in self.choices:
            if choice.stream is not None and not choice.context.is_done:
                self._engine.cancel(choice.context.request_id)
            choice.stream = None

    @property
    def usage(self) -> Usage:
        per_prompt = self.choices[:: self._n]
        return Usage(
            prompt_tokens=sum(c.context.tokens.prompt_length for c in per_prompt),
            completion_tokens=sum(c.num_tokens for c in self.choices),
            cached_tokens=sum(c.num_cached_tokens for c in per_prompt),
        )

    async def _follow(self, choice: Choice) -> AsyncIterator[list[ChoiceDelta]]:
        assert choice.stream is not None, "deltas() before start()"
        async for output in choice.stream:
            self._observe(choice, output)
            delta = choice.feed(output)
            if delta is not None:
                yield [delta]
            if choice.finish_reason is not None:
                if not output.is_done:
                    self._engine.cancel(choice.context.request_id)
                return
        raise WorkerGroupError("The generation ended before its last token. Send the request again.")

    async def _merged(self) -> AsyncIterator[list[ChoiceDelta]]:
        queue: asyncio.Queue[ChoiceDelta | asyncio.Task[None]] = asyncio.Queue()

        async def pump(choice: Choice) -> None:
            async for (delta,) in self._follow(choice):
                queue.put_nowait(delta)

        tasks = [asyncio.create_task(pump(choice)) for choice in self.choices]
        for task in tasks:
            task.add_done_callback(queue.put_nowait)
        num_open = len(tasks)
        try:
            while num_open:
                items = [await queue.get()]
                items += [queue.get_nowait() for _ in range(queue.qsize())]
                if deltas := [item for item in items if isinstance(item, ChoiceDelta)]:
                    yield deltas
                for task in (item for item in items if isinstance(item, asyncio.Task)):
                    num_open -= 1
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _observe(self, choice: Choice, output: TextGenerationOutput) -> None:
        """Latencies: the first token from the arrival, later ones from the one before."""
        count = len(output.tokens)
        if not count:
            return
        now = perf_counter()
        metrics = self._engine.metrics
        metrics.generated_tokens += count
        if choice.last_token_time:
            metrics.inter_token_latency.observe((now - choice.last_token_time) / count, count)
        else:
            metrics.time_to_first_token.observe(now - self._arrival)
        choice.last_token_time = now


async def _choices_of(engine: Engine, job: GenerationJob, prompt: str | list[int] | None, start: int) -> list[Choice]:
    """The n choices of one prompt (None: of the messages), numbered from `start`; it is tokenized once."""
    choices: list[Choice] = []
    ids: Any = None
    images: tuple[PromptImage, ...] = ()
    for number in range(job.n):
        request = TextGenerationRequest(
            request_id=RequestID(),
            model_name=engine.model_name,
            prompt=prompt if ids is None else ids,
            messages=job.messages if ids is None else (),
            sampling_params=_numbered_seed(job.sampling, number),
            logprobs=job.logprobs,
            echo=job.echo,
            images=images,
        )
        context = await engine.tokenizer.new_context(request)
        choice = Choice(start + number, context, engine.tokenizer, job)
        ids, images = context.tokens.prompt, context.images
        if job.echo:
            choice.echo(prompt if isinstance(prompt, str) else engine.tokenizer.decode_ids(ids.tolist(), True))
        choices.append(choice)
        if len(ids) > INLINE_CHARACTERS:
            await asyncio.sleep(0)  # a copy of a long prompt takes a while, and there may be many
    return choices


def _numbered_seed(sampling: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Choice i of a seeded request draws with seed + i (modulo 2**64)."""
    seed = sampling.get("seed")
    return dict(sampling) if seed is None or number == 0 else {**sampling, "seed": (seed + number) % 2**64}

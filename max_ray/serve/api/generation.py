"""One request's generations, from contexts to pieces of text, for every way in (HTTP, handle, streamed or not).

    GenerationJob -> contexts (one a choice) -> engine streams -> ChoiceDelta: text, log probabilities, the end

A choice (`choice.py`) ends when its context is done or a stop string is completed; whatever else happens, `close`
cancels the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from max_ray.errors import InputError, WorkerGroupError
from max_ray.interfaces import PromptImage, RequestID, TextGenerationOutput, TextGenerationRequest
from max_ray.serve.api.access.caller import CALLER, DEADLINE, ROUTE
from max_ray.serve.api.choice import Choice, ChoiceDelta, PromptEcho
from max_ray.serve.api.engine import Engine
from max_ray.serve.api.objects.openai import UsageObject
from max_ray.serve.api.openai import GenerationJob
from max_ray.serve.api.parsed_choice import made_choice
from max_ray.serve.api.phase_times import finished_choice
from max_ray.serve.api.reasoning import set_reasoning
from max_ray.serve.api.spans import SPANS
from max_ray.serve.api.structured_output_fields import check_grammar
from max_ray.tokenization.tokenizer import INLINE_CHARACTERS

# A prompt of more tokens is echoed with offsets in a thread: a token takes some microseconds.
_INLINE_ECHO_TOKENS = 4096
_HTTP_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "chat_template_options": "chat_template_kwargs",
}


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request: each prompt once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_dict(self) -> UsageObject:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Generation:
    """All choices of one request. `prepare`, `start`, iterate `deltas`, and always `close`."""

    def __init__(self, engine: Engine, choices: list[Choice], job: GenerationJob, arrival: float) -> None:
        self.choices = choices
        self._engine = engine
        self._n = job.n
        self._num_returned = job.num_returned
        self._arrival = arrival
        self._counts = engine.metrics.of_route(ROUTE.get())
        self._is_started = False
        self._spans = SPANS.get()
        self._caller = CALLER.get()
        self._is_closed = False
        self._answer_id: str | None = None
        for choice in choices:
            choice.context.tenant, choice.context.tenant_weight = self._caller.name, self._caller.weight
            choice.context.deadline = DEADLINE.get()

    @classmethod
    async def prepare(cls, engine: Engine, job: GenerationJob, arrival: float | None = None) -> Generation:
        """Tokenizes and checks everything. `arrival`: perf_counter() when the request came. Raises InputError."""
        choices: list[Choice] = []
        prompts: Sequence[str | list[int] | None] = job.prompts or [None]
        await check_grammar(job.sampling.get("structured_output"), job.grammar_field)
        try:
            for prompt in prompts:
                choices += await _choices_of(engine, job, prompt, len(choices))
                await asyncio.sleep(0)
        except InputError as error:
            names = _HTTP_NAMES | ({"prompt": "messages"} if job.messages else {})
            error.param = names.get(error.param or "", error.param)
            raise
        return cls(engine, choices, job, perf_counter() if arrival is None else arrival)

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
        self._is_started = True
        num_tokens = sum(c.context.tokens.prompt_length for c in self.choices)
        self._engine.metrics.prompt_tokens += num_tokens
        self._caller.usage.add_tokens(num_tokens)

    def deltas(self) -> AsyncIterator[list[ChoiceDelta]]:
        """What the choices gain; those that gain together come together. Raises WorkerGroupError."""
        return self._merged() if len(self.choices) > 1 else self._follow(self.choices[0])

    def close(self) -> None:
        """Cancels what still runs. Idempotent."""
        for choice in self.choices:
            if choice.stream is not None and not choice.context.is_done:
                self._engine.cancel(choice.context.request_id)
            choice.stream = None
        if not self._is_closed:
            self._is_closed = True
            self._caller.usage.add_tokens(sum(choice.num_tokens for choice in self.choices))
            for choice in self.choices if self._is_started else ():
                self._counts.finish(finished_choice(choice, self._arrival))
            if self._answer_id is not None:
                self._engine.requests.end(self._answer_id, self)
            if self._spans is not None and self._is_started:
                self._spans.record(self)

    def name_answer(self, answer_id: str) -> None:
        """Has the request logged under the id of its answer. To be called once it has been started."""
        self._answer_id = answer_id
        self._engine.requests.begin(answer_id, self)

    @property
    def answer_id(self) -> str | None:
        """The id of the answer, where it has one."""
        return self._answer_id

    @property
    def model_name(self) -> str:
        """The name of the model."""
        return self._engine.model_name

    @property
    def is_closed(self) -> bool:
        """Whether the request has ended."""
        return self._is_closed

    @property
    def num_choices(self) -> int:
        """Of the request."""
        return len(self.choices)

    @property
    def owner(self) -> str:
        """The name of the API key that sent the request."""
        return self._caller.name

    @property
    def arrival(self) -> float:
        """perf_counter() when the request came."""
        return self._arrival

    @property
    def usage(self) -> Usage:
        per_prompt = self.choices[:: self._n]
        return Usage(
            prompt_tokens=sum(c.context.tokens.prompt_length for c in per_prompt),
            completion_tokens=sum(c.num_tokens for c in self.choices),
            cached_tokens=sum(c.num_cached_tokens for c in per_prompt),
        )

    @property
    def timings(self) -> dict[str, float]:
        """How long the prompts and the tokens so far have taken, by llama.cpp's names; milliseconds."""
        usage, now = self.usage, perf_counter()
        first = min((c.first_token_time for c in self.choices if c.first_token_time), default=now)
        last = max(c.last_token_time for c in self.choices) or now
        prompt_n = usage.prompt_tokens - usage.cached_tokens
        prompt_s, predicted_s = first - self._arrival, last - first
        return {
            "cache_n": usage.cached_tokens,
            **_timing("prompt", prompt_n, prompt_s),
            **_timing("predicted", usage.completion_tokens, predicted_s),
        }

    def prompt_ids(self, index: int) -> list[int]:
        """The prompt's tokens, of the choice that is given back with this number."""
        number = index // (self._num_returned or self._n)
        ids: list[int] = self.choices[number * self._n].context.tokens.prompt.tolist()
        return ids

    def best(self, deltas: list[ChoiceDelta]) -> list[ChoiceDelta]:
        """The choices that are given back: of each prompt the likeliest ones, where not all are asked for.

        Args:
            deltas: Of all choices, in order; whole.
        """
        if self._num_returned is None:
            return deltas
        best: list[ChoiceDelta] = []
        for start in range(0, len(deltas), self._n):
            of_prompt = deltas[start : start + self._n]
            ranked = sorted(of_prompt, key=lambda delta: -self.choices[delta.index].log_probability)
            best += ranked[: self._num_returned]
        for index, delta in enumerate(best):
            delta.index = index
        return best

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
        self._engine.metrics.generated_tokens += count
        if choice.first_token_time:
            self._counts.inter_token_latency.observe((now - choice.last_token_time) / count, count)
        else:
            choice.first_token_time = now
            self._counts.time_to_first_token.observe(now - self._arrival)
        choice.last_token_time = now


def _timing(name: str, count: int, seconds: float) -> dict[str, float]:
    milliseconds = 1000 * seconds
    return {
        f"{name}_n": count,
        f"{name}_ms": milliseconds,
        f"{name}_per_token_ms": milliseconds / count if count else 0.0,
        f"{name}_per_second": count / seconds if seconds else 0.0,
    }


async def _choices_of(engine: Engine, job: GenerationJob, prompt: str | list[int] | None, start: int) -> list[Choice]:
    """The n choices of one prompt (None: of the messages), numbered from `start`; it is tokenized once."""
    choices: list[Choice] = []
    ids: Any = None
    images: tuple[PromptImage, ...] = ()
    echo: PromptEcho | None = None
    for number in range(job.n):
        request = TextGenerationRequest(
            request_id=RequestID(),
            model_name=engine.model_name,
            prompt=prompt if ids is None else ids,
            messages=job.messages if ids is None else (),
            sampling_params=_numbered_seed(job.sampling, number),
            logprobs=job.reported_logprobs,
            echo=(job.echo and job.logprobs is not None) or job.prompt_logprobs is not None,
            cache_salt=job.cache_salt,
            priority=job.priority,
            chat_template_options=job.template_options if ids is None and job.messages else None,
            images=images,
            **job.prompt_options.as_fields(),
        )
        context = await engine.tokenizer.new_context(request)
        set_reasoning(context, engine, job)
        if ids is None:
            ids, images = context.tokens.prompt, context.images
            is_cut = job.prompt_options.truncate_prompt_tokens is not None
            echo = await _echo_of(engine, job, None if is_cut else prompt, ids.tolist()) if job.echo else None
        if job.chat is not None:
            choices.append(made_choice(start + number, context, engine.tokenizer, engine.parsers, job))
        else:
            choices.append(Choice(start + number, context, engine.tokenizer, job, echo))
        if len(ids) > INLINE_CHARACTERS:
            await asyncio.sleep(0)  # a copy of a long prompt takes a while, and there may be many
    return choices


async def _echo_of(engine: Engine, job: GenerationJob, prompt: str | list[int] | None, ids: list[int]) -> PromptEcho:
    text = prompt if isinstance(prompt, str) else None
    with_offsets = job.logprobs is not None
    if with_offsets and len(ids) > _INLINE_ECHO_TOKENS:
        return await asyncio.to_thread(PromptEcho.of, text, ids, engine.tokenizer, with_offsets=True)
    return PromptEcho.of(text, ids, engine.tokenizer, with_offsets=with_offsets)


def _numbered_seed(sampling: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Choice i of a seeded request draws with seed + i (modulo 2**64)."""
    seed = sampling.get("seed")
    return dict(sampling) if seed is None or number == 0 else {**sampling, "seed": (seed + number) % 2**64}

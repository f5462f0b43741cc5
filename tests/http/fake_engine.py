"""An Engine without a model: it says what a script tells it, one token a step, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from max_ray.errors import MaxRayError
from max_ray.interfaces import (
    EmbeddingsContext,
    EmbeddingsGenerationOutput,
    GenerationStatus,
    LogProbabilities,
    PipelineTask,
    RequestID,
    TextContext,
    TextGenerationOutput,
)
from max_ray.scheduler import LoopActivity, RequestActivity, SchedulerLimits, SchedulerStats
from max_ray.serve.api.metrics import Metrics, MetricsSnapshot
from max_ray.serve.api.model_parsers import ModelParsers
from max_ray.serve.api.request_log import RequestLog
from max_ray.tokenization.tokenizer import TextTokenizer

Script = Callable[[TextContext], str | list[int]]


class FakeEngine:
    """script: context -> the text (or ids) to say; the end-of-sequence token follows.

    The log probability of the token at position p of the sequence is -p / 8; alternative j is token j with -j - 1.
    gate: when set, every token after the first waits for it. fail_after: the stream raises `failure` after so many
    tokens. refuse: raised by `submit`, after `accept_first` calls.
    """

    def __init__(self, tokenizer: TextTokenizer, script: Script) -> None:
        self.model_name = "fake"
        self.model_aliases: tuple[str, ...] = ()
        self.task = PipelineTask.TEXT_GENERATION
        self.embedding_size: int | None = None
        self.tokenizer = tokenizer
        self.parsers = ModelParsers.of(tokenizer)
        self.metrics = Metrics("fake", "r0")
        self.requests = RequestLog("r0", max_choices=100)
        self.script = script
        self.contexts: list[TextContext] = []
        self.cancelled: list[RequestID] = []
        self.gate: asyncio.Event | None = None
        self.failure: BaseException | None = None
        self.fail_after = 0
        self.refuse: MaxRayError | None = None
        self.accept_first = 0
        self.is_healthy = True
        self.num_waiting = 0
        self.cached_tokens = 0
        self.tokens_per_output = 1
        self.listed: tuple[RequestActivity, ...] = ()

    def submit(self, context: TextContext) -> AsyncIterator[TextGenerationOutput]:
        if self.refuse is not None and len(self.contexts) >= self.accept_first:
            raise self.refuse
        self.contexts.append(context)
        said = self.script(context)
        ids = self.tokenizer.encode_text(said, False).tolist() if isinstance(said, str) else said
        return self._steps(context, [*ids, self.tokenizer.eos][context.tokens.generated_length :])

    def embed(self, contexts: Sequence[EmbeddingsContext]) -> Awaitable[list[EmbeddingsGenerationOutput]]:
        raise AssertionError("this engine generates text")

    def cancel(self, request_id: RequestID) -> None:
        self.cancelled.append(request_id)

    async def healthy(self) -> bool:
        return self.is_healthy

    async def metrics_snapshots(self) -> Sequence[MetricsSnapshot]:
        stats = SchedulerStats(queued=2, running=3, num_used_blocks=5, num_blocks=64)
        sibling = Metrics("fake", "r1").snapshot(SchedulerStats(num_blocks=64))
        return [self.metrics.snapshot(stats), sibling]

    @property
    def activity(self) -> LoopActivity:
        return LoopActivity(SchedulerLimits(8, 512, 32, 4), page_size=16, num_blocks=64, requests=self.listed)

    async def _steps(self, context: TextContext, ids: list[int]) -> AsyncIterator[TextGenerationOutput]:
        echo = self._prompt_log_probabilities(context)
        if echo:  # as a chunked prompt does: some entries come before the first token
            yield TextGenerationOutput(request_id=context.request_id, prompt_log_probabilities=echo[:1])
        output = self._output(context, echo[1:] or None)
        for number, token in enumerate(ids):
            if self.failure is not None and number == self.fail_after:
                raise self.failure
            await (self.gate.wait() if self.gate is not None and number else asyncio.sleep(0))
            if context.log_probabilities is not None:
                entry = self._entry(context, token, len(context.tokens))
                output.log_probabilities = [*(output.log_probabilities or []), entry]
            context.update(token)
            output.tokens.append(token)
            output.final_status = context.status
            if context.is_done or len(output.tokens) == self.tokens_per_output:
                yield output
                output = self._output(context, None)
            if context.is_done:
                return

    def _output(self, context: TextContext, echo: list[LogProbabilities | None] | None) -> TextGenerationOutput:
        return TextGenerationOutput(
            request_id=context.request_id,
            prompt_log_probabilities=echo,
            num_cached_tokens=self.cached_tokens,
            final_status=GenerationStatus.ACTIVE,
        )

    def _prompt_log_probabilities(self, context: TextContext) -> list[LogProbabilities | None]:
        if not context.log_probabilities_echo:
            return []
        later = enumerate(context.tokens.prompt.tolist()[1:], start=1)
        return [None, *[self._entry(context, token, position) for position, token in later]]

    def _entry(self, context: TextContext, token: int, position: int) -> LogProbabilities:
        assert context.log_probabilities is not None
        top = [(5 + j, float(-j - 1)) for j in range(context.log_probabilities)]
        return LogProbabilities(token, -position / 8, top)

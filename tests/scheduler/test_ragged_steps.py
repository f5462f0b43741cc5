"""Steps that give a request several tokens or none: ends, limits, log probabilities, extensions, prefixes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import numpy as np
import pytest

from max_ray.errors import StructuredOutputError
from max_ray.interfaces import (
    Executor,
    GenerationStatus,
    KVCacheClient,
    LogProbabilities,
    RequestID,
    RunExtension,
    RunRequest,
    SamplingParams,
    StepOutput,
    TextContext,
    TextGenerationInputs,
    TextGenerationOutput,
    TokenBuffer,
)
from max_ray.pipelines.text_generation import TextGenerationPipeline
from max_ray.scheduler import GenerationLoop, SchedulerLimits
from tests.scheduler.fakes import VOCABULARY, CountingLedger, expected_tokens
from tests.scheduler.ragged import RaggedExecutor, Widths

STOP = 7


def make_context(
    name: str = "a",
    prompt: list[int] | None = None,
    max_new_tokens: int = 8,
    *,
    stop: tuple[int, ...] = (),
    min_new_tokens: int = 0,
    max_length: int = 1000,
    log_probabilities: int | None = None,
) -> TextContext:
    return TextContext(
        request_id=RequestID(name),
        tokens=TokenBuffer(prompt or [1, 2, 3]),
        max_length=max_length,
        eos_token_ids=frozenset(stop),
        log_probabilities=log_probabilities,
        sampling_params=SamplingParams(max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens),
    )


@pytest.mark.parametrize(
    ("fields", "new", "num_taken", "status"),
    [
        ({}, [4], 1, GenerationStatus.ACTIVE),
        ({}, [4, 5, 6], 3, GenerationStatus.ACTIVE),
        ({"stop": (STOP,)}, [STOP, 5, 6], 1, GenerationStatus.END_OF_SEQUENCE),
        ({"stop": (STOP,)}, [5, STOP, 6], 2, GenerationStatus.END_OF_SEQUENCE),
        ({"stop": (STOP,)}, [5, 6, STOP], 3, GenerationStatus.END_OF_SEQUENCE),
        ({"stop": (STOP,), "min_new_tokens": 1}, [STOP, 5, 6], 3, GenerationStatus.ACTIVE),
        ({"stop": (STOP,), "min_new_tokens": 1}, [STOP, STOP, 6], 2, GenerationStatus.END_OF_SEQUENCE),
        ({"max_new_tokens": 3}, [4, 5, 6], 3, GenerationStatus.MAXIMUM_LENGTH),
        ({"max_new_tokens": 2}, [4, 5, 6], 2, GenerationStatus.MAXIMUM_LENGTH),
        ({"max_new_tokens": 2, "stop": (STOP,)}, [4, STOP, 6], 2, GenerationStatus.END_OF_SEQUENCE),
        ({"max_length": 4}, [4, 5], 1, GenerationStatus.MAXIMUM_LENGTH),
    ],
)
def test_extend_takes_tokens_until_the_request_ends(
    fields: dict[str, object], new: list[int], num_taken: int, status: GenerationStatus
) -> None:
    context = make_context(**fields)  # type: ignore[arg-type]
    assert context.extend(new) == num_taken
    assert (context.status, context.tokens.generated.tolist()) == (status, new[:num_taken])
    assert context.processed_length == 3 + num_taken - 1, "all tokens but the last one have run"
    assert (context.active_end, context.active_length) == (3 + num_taken, 1)


def test_extend_by_nothing_changes_nothing() -> None:
    context = make_context()
    assert context.extend([]) == 0
    assert (context.processed_length, context.active_end) == (0, 3)


class Script(Executor):
    """Answers a run with prepared steps."""

    can_extend = False

    def __init__(self, *steps: StepOutput) -> None:
        self.steps = steps

    async def stream(self, request: RunRequest) -> AsyncIterator[StepOutput]:
        for step in self.steps:
            yield step

    def interrupt(self, run_id: int) -> None:
        raise AssertionError("not interrupted here")

    def extend(self, extension: RunExtension) -> None:
        raise AssertionError("not extended here")


def step_output(number: int, *rows: list[int], logged: tuple[int, ...] = ()) -> StepOutput:
    tokens = np.array([token for row in rows for token in row], dtype=np.int64)
    entries = {i: [LogProbabilities(token, -float(token), []) for token in rows[i]] for i in logged}
    return StepOutput(number, tokens, np.cumsum([0, *map(len, rows)]), False, log_probabilities=entries or None)


async def outputs_of(contexts: list[TextContext], *steps: StepOutput) -> list[dict[str, TextGenerationOutput]]:
    stream = TextGenerationPipeline(Script(*steps)).stream(TextGenerationInputs([contexts], num_steps=8))
    return [{key.value: output for key, output in outputs.items()} async for outputs in stream]


async def test_rows_of_one_step_gain_different_numbers_of_tokens() -> None:
    contexts = [make_context(name, log_probabilities=0, stop=(STOP,)) for name in "abcd"]
    steps = [step_output(0, [4], [], [5, 6], [8, STOP, 9], logged=(0, 2, 3)), step_output(1, [], [4, 4], [4], [4])]
    first, second = await outputs_of(contexts, *steps)
    assert {key: output.tokens for key, output in first.items()} == {"a": [4], "c": [5, 6], "d": [8, STOP]}
    entries = {key: [entry.token_id for entry in output.log_probabilities or []] for key, output in first.items()}
    assert entries == {"a": [4], "c": [5, 6], "d": [8, STOP]}, "none for the tokens behind the end"
    assert first["d"].final_status is GenerationStatus.END_OF_SEQUENCE
    assert {key: output.tokens for key, output in second.items()} == {"b": [4, 4], "c": [4]}
    assert all(output.log_probabilities is None for output in second.values())


async def test_a_row_without_a_token_stays_as_it_is() -> None:
    """Its last tokens run again; a chunk of its prompt is done."""
    sampling, chunked = make_context("a"), make_context("b", [1, 2, 3, 4])
    chunked.chunk(2)
    assert await outputs_of([sampling, chunked], step_output(0, [], []), step_output(1, [], [])) == [{}, {}]
    assert (sampling.processed_length, sampling.active_end) == (0, 3)
    assert (chunked.processed_length, chunked.active_end) == (2, 4)


async def test_a_step_of_another_batch_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="another batch"):
        await outputs_of([make_context("a"), make_context("b")], step_output(0, [4]))


async def test_a_row_that_fails_ends_alone_with_its_error() -> None:
    step = step_output(0, [4, 5], [], [6])
    step.errors = {1: "the grammar ran out of fuel"}
    contexts = [make_context(name, max_new_tokens=len(name)) for name in ("aa", "b", "c")]
    last = step_output(1, [], [], [])
    last.last = True
    loop = GenerationLoop(
        TextGenerationPipeline(Script(step, last)), CountingLedger(64, 4), SchedulerLimits(4, 16, 64, 8)
    )
    streams = [loop.submit(context) for context in contexts]
    task = asyncio.create_task(loop.run())
    assert (await anext(streams[0])).tokens == [4, 5]
    with pytest.raises(StructuredOutputError, match="ran out of fuel"):
        await anext(streams[1])
    assert (await anext(streams[2])).is_done
    assert (loop.stats.failed, loop.stats.finished, loop.stats.running) == (1, 2, 0)
    task.cancel()


@dataclass
class Served:
    """A loop over the real pipeline and a ragged executor."""

    loop: GenerationLoop
    executor: RaggedExecutor
    ledger: CountingLedger

    async def generate(self, context: TextContext) -> list[TextGenerationOutput]:
        """Runs one request to its end and checks its tokens and log probabilities."""
        expected = expected_tokens(context.tokens.prompt.tolist(), context.remaining_new_tokens)
        ends = [i + 1 for i, token in enumerate(expected) if token in context.stop_ids]
        expected = expected[: ends[0]] if ends else expected
        outputs = [output async for output in self.loop.submit(context)]
        tokens = [token for output in outputs for token in output.tokens]
        assert tokens == expected, context.request_id
        if context.log_probabilities is not None:
            assert [e.token_id for output in outputs for e in output.log_probabilities or []] == expected
        stopped = GenerationStatus.END_OF_SEQUENCE if ends else GenerationStatus.MAXIMUM_LENGTH
        assert outputs[-1].final_status is stopped
        return outputs


@asynccontextmanager
async def serving(
    widths: Widths,
    *,
    num_blocks: int = 256,
    page_size: int = 4,
    max_batch_size: int = 4,
    budget: int = 16,
    max_num_steps: int = 8,
    can_extend: bool = True,
    fail_at: int | None = None,
) -> AsyncIterator[Served]:
    """Checks at the end that all blocks are back."""
    ledgers = [CountingLedger(num_blocks, page_size)]
    executor = RaggedExecutor(page_size, widths, can_extend, fail_at)
    limits = SchedulerLimits(max_batch_size, budget, 64, max_num_steps)

    async def recover() -> KVCacheClient:
        ledgers.append(CountingLedger(num_blocks, page_size))
        return ledgers[-1]

    loop = GenerationLoop(TextGenerationPipeline(executor), ledgers[0], limits, recover, flush_after_s=0.0)
    task = asyncio.create_task(loop.run())
    try:
        yield Served(loop, executor, ledgers[0])
        for _ in range(50):
            await asyncio.sleep(0)
        assert (ledgers[-1].used, loop.stats.running, loop.stats.queued) == (0, 0, 0)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("page_size", [1, 3, 4])
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("num_new", [1, 2, 3, 7, 8, 9, 16, 17, 40])
async def test_limits_at_each_border(width: int, num_new: int, page_size: int) -> None:
    async with serving(lambda key, step: width, page_size=page_size) as served:
        await served.generate(make_context("a", [5, 6], num_new, log_probabilities=0))
        gained = [step["a"] for run in served.executor.runs for step in run]
        assert sum(gained) == num_new
        if width == 1:
            assert len(served.executor.runs) == 1, "extended until it ends"


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("nth", range(1, 9))
async def test_a_stop_id_at_each_place_of_a_step(width: int, nth: int) -> None:
    tokens = expected_tokens([5, 6], 40)
    stop = next(token for token in tokens[nth - 1 :] if tokens.index(token) >= nth - 1)
    async with serving(lambda key, step: width) as served:
        outputs = await served.generate(make_context("a", [5, 6], 40, stop=(stop,), log_probabilities=0))
        assert outputs[-1].tokens[-1] == stop


async def test_two_tokens_a_step_are_extended_in_time() -> None:
    """A run of 8 gives 8 tokens, here in 4 steps: it is extended when 4 tokens are left, not 4 steps."""
    async with serving(lambda key, step: 2) as served:
        await served.generate(make_context("a", [5, 6], 64))
        assert len(served.executor.runs) == 1
        assert len(served.executor.runs[0]) == 32
    assert served.executor.num_extensions == served.loop.stats.extensions == 7


async def test_the_fastest_row_decides_when_a_run_is_extended() -> None:
    async with serving(lambda key, step: 3 if key == "a" else step % 2, max_num_steps=16) as served:
        contexts = [make_context("a", [5, 6], 90), make_context("b", [9, 1], 30)]
        await asyncio.gather(*map(served.generate, contexts))
    assert served.executor.num_extensions >= 4


async def test_a_row_that_lags_behind_may_catch_up_after_an_extension() -> None:
    """Blocks cover the tokens that a run may give a row, and not its steps that are left."""
    async with serving(lambda key, step: 1 if key == "a" else 20 * (step >= 6), page_size=1) as served:
        contexts = [make_context("a", [5, 6], 30), make_context("b", [9, 1], 30)]
        await asyncio.gather(*map(served.generate, contexts))
        assert served.executor.runs[0][6] == {"a": 1, "b": 16}


@pytest.mark.parametrize("open_at", [4, 9, 14, 18])
async def test_tokens_that_come_while_an_extension_is_decided(open_at: int) -> None:
    async with serving(lambda key, step: 1 + step % 2, max_num_steps=16, page_size=1) as served:
        asking = asyncio.create_task(served.generate(make_context("a", [5, 6], 60)))
        while not served.executor.runs:
            await asyncio.sleep(0)
        served.ledger.gate.clear()
        for _ in range(open_at):
            await asyncio.sleep(0)
        served.ledger.gate.set()
        await asking


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("page_size", [1, 2, 4, 5])
async def test_generated_blocks_are_committed_and_found_again(width: int, page_size: int) -> None:
    async with serving(lambda key, step: width, page_size=page_size) as served:
        first = make_context("a", [5, 6, 7], 20)
        await served.generate(first)
        prompt = [*first.tokens.all.tolist(), 11]
        again = make_context("b", prompt, 5)
        await served.generate(again)
        written = len(first.tokens) - 1  # the last token was never run
        assert again.cached_prefix_length == written // page_size * page_size


async def test_blocks_for_few() -> None:
    rng = random.Random(3)
    async with serving(lambda key, step: rng.randrange(4), num_blocks=10, page_size=4, max_batch_size=4) as served:
        await asyncio.gather(*(served.generate(make_context(f"r{i}", [i + 1, i + 2], 30)) for i in range(5)))
    assert served.loop.stats.preemptions > 0


@pytest.mark.parametrize("seed", range(40))
async def test_random_traffic(seed: int) -> None:
    rng = random.Random(seed)
    page_size = rng.choice([1, 3, 4])
    async with serving(
        lambda key, step: rng.choice([0, 1, 1, 2, 3]),
        num_blocks=-(-rng.choice([60, 90, 400]) // page_size),
        page_size=page_size,
        max_batch_size=rng.choice([1, 3, 6]),
        budget=rng.choice([4, 16]),
        max_num_steps=rng.choice([1, 2, 3, 8]),
        can_extend=rng.random() < 0.8,
        fail_at=rng.choice([None, rng.randrange(60)]),
    ) as served:
        await asyncio.gather(*(_visit(served, f"r{i}", rng) for i in range(10)))
        assert served.loop.healthy


async def _visit(served: Served, name: str, rng: random.Random) -> None:
    """One request that comes at some time and ends, or is given up, at some time."""
    for _ in range(rng.randrange(60)):
        await asyncio.sleep(0)
    first = rng.randrange(10)
    context = make_context(
        name,
        list(range(first, first + rng.randrange(1, 10))),
        rng.randrange(1, 40),
        stop=tuple(rng.sample(range(VOCABULARY), 2)),
        log_probabilities=rng.choice([None, 0]),
    )
    if rng.random() < 0.2:
        async for _ in (stream := served.loop.submit(context)):
            if rng.random() < 0.5:
                await stream.aclose()
    else:
        await served.generate(context)

"""Runs that get more steps and more blocks while they go on: the tokens are those of Hugging Face, on 1 and 2 ranks,
step by step and ahead, replayed and not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from max_ray.interfaces import Extensions, RunRequest, StepOutput, TextContext, TextGenerationInputs
from max_ray.pipelines.text_generation import TextGenerationPipeline
from tests.engine.ahead import Recorder, ahead
from tests.pipelines.conftest import Lab, make_context, random_prompt, run_to_end

LENGTHS = (5, 16, 31)
PATHS = ["plain", "ahead", "graphs", "ahead with graphs"]


def on_path(pipeline: TextGenerationPipeline, path: str) -> TextGenerationPipeline:
    if path == "plain":
        return pipeline
    lookahead = int(path.startswith("ahead"))
    return ahead(pipeline, lookahead=lookahead, recorder=Recorder() if "graphs" in path else None)


async def run_extended(
    pipeline: TextGenerationPipeline, contexts: Sequence[TextContext], num_steps: int, at: int, most: int
) -> int:
    """One run of `num_steps`, extended by as many whenever `at` of them are left, up to `most`; gives its steps."""
    manager = pipeline.kv_manager
    for context in contexts:
        manager.claim(context.request_id)
        manager.alloc(context, num_steps=num_steps)
    total, steps = num_steps, 0
    async with aclosing(pipeline.stream(TextGenerationInputs(batches=[list(contexts)], num_steps=num_steps))) as run:
        async for _ in run:
            steps += 1
            if total - steps == at and total < most:
                for context in contexts:
                    if not context.is_done:
                        manager.alloc(context, num_steps=at + num_steps)
                total += num_steps
                pipeline.extend(total)
    for context in contexts:
        pipeline.release(context.request_id)
    return steps


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("path", PATHS)
def test_tokens_of_hugging_face(lab: Lab, path: str, size: int, page_size: int) -> None:
    pipeline = on_path(lab.pipeline(page_size=page_size, tensor_parallel_size=size), path)
    contexts = [make_context(random_prompt(n), max_new_tokens=12 + 5 * i) for i, n in enumerate(LENGTHS)]
    steps = asyncio.run(run_extended(pipeline, contexts, num_steps=4, at=2, most=100))
    assert steps == 22
    assert [c.tokens.generated.tolist() for c in contexts] == [
        lab.greedy(random_prompt(n), 12 + 5 * i) for i, n in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("path", PATHS)
def test_the_run_ends_with_its_last_extension(lab: Lab, path: str) -> None:
    pipeline = on_path(lab.pipeline(page_size=4), path)
    contexts = [make_context(random_prompt(n), max_new_tokens=30) for n in LENGTHS]
    assert asyncio.run(run_extended(pipeline, contexts, num_steps=5, at=3, most=15)) == 15
    assert [c.tokens.generated.tolist() for c in contexts] == [lab.greedy(random_prompt(n), 15) for n in LENGTHS]


@pytest.mark.parametrize("path", PATHS)
def test_sampled_rows_and_rows_that_end(lab: Lab, path: str) -> None:
    """Penalties see what the extended run has generated; a row with an end of sequence leaves it."""

    def contexts(eos: list[int]) -> list[TextContext]:
        sampled = make_context(random_prompt(9), temperature=0.9, top_k=20, seed=3, max_new_tokens=24)
        penalised = make_context(random_prompt(18, seed=27), repetition_penalty=1.8, max_new_tokens=24, logprobs=2)
        return [sampled, penalised, make_context(random_prompt(7), eos=eos, max_new_tokens=24)]

    eos = [lab.greedy(random_prompt(7), 24)[10]]
    expected = [output.tokens for output in run_to_end(lab.pipeline(), contexts(eos), num_steps=1)]
    extended = contexts(eos)
    asyncio.run(run_extended(on_path(lab.pipeline(page_size=4), path), extended, num_steps=4, at=2, most=100))
    assert [c.tokens.generated.tolist() for c in extended] == expected
    assert len(expected[2]) < 24


def test_an_extension_that_comes_too_late(lab: Lab) -> None:
    pipeline = lab.pipeline()
    context = make_context(random_prompt(5), max_new_tokens=20)
    assert asyncio.run(run_extended(pipeline, [context], num_steps=4, at=0, most=100)) == 4
    assert context.tokens.generated.tolist() == lab.greedy(random_prompt(5), 4)
    context.reset()  # its blocks went back with the end of the run
    run_to_end(pipeline, [context])
    assert context.tokens.generated.tolist() == lab.greedy(random_prompt(5), 20)


@pytest.mark.parametrize("size", [1, 2])
def test_an_interrupted_run_takes_no_extension(lab: Lab, size: int) -> None:
    pipeline = lab.pipeline(tensor_parallel_size=size)
    context = make_context(random_prompt(5), max_new_tokens=60)

    async def interrupted() -> int:
        pipeline.kv_manager.claim(context.request_id)
        pipeline.kv_manager.alloc(context, num_steps=60)
        steps = 0
        async with aclosing(pipeline.stream(TextGenerationInputs(batches=[[context]], num_steps=8))) as run:
            async for _ in run:
                steps += 1
                if steps == 2:
                    pipeline.interrupt()
                    pipeline.extend(60)
        return steps

    steps = asyncio.run(interrupted())
    assert 2 <= steps <= 4
    pipeline.release(context.request_id)
    assert context.tokens.generated.tolist() == lab.greedy(random_prompt(5), steps)


def test_messages_to_the_workers_hold_the_block_table_of_the_ledger(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = lab.pipeline(page_size=1)
    context = make_context(random_prompt(5), max_new_tokens=20)
    manager, runner = pipeline.kv_manager, pipeline.executor.runners[0]  # type: ignore[attr-defined]
    tables: list[list[int]] = []

    def run(request: RunRequest, should_stop: Any, extensions: Extensions) -> Iterator[StepOutput]:
        tables.append(request.rows[0].block_table.tolist())
        yield from original(request, should_stop, extensions)
        tables.append(extensions.get(request.run_id, 1).block_tables[0].tolist())

    original = runner.run
    monkeypatch.setattr(runner, "run", run)

    async def look() -> None:
        manager.claim(context.request_id)
        manager.alloc(context, num_steps=4)
        async with aclosing(pipeline.stream(TextGenerationInputs(batches=[[context]], num_steps=4))) as run:
            async for _ in run:
                if context.tokens.generated_length == 1:
                    manager.alloc(context, num_steps=15)
                    pipeline.extend(15)

    asyncio.run(look())
    assert tables[-1] == manager.get_req_blocks(context.request_id) == context.block_table.tolist()
    assert [len(table) for table in tables] == [5 + 3, 5 + 1 + 14]
    pipeline.release(context.request_id)

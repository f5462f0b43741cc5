"""The loop over the real pipeline in this process: a cache too small for all, chunks, preemption, cancels; the tokens
are Hugging Face's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from max_ray.interfaces import (
    RequestID,
    SamplingParams,
    TextContext,
    TextGenerationInputs,
    TextGenerationOutput,
    TokenBuffer,
)
from max_ray.kv_cache import LocalKVCacheClient, PagedKVCacheManager
from max_ray.pipelines import PIPELINE_REGISTRY, PipelineConfig
from max_ray.scheduler import GenerationLoop, SchedulerLimits
from tests.checkpoints import load_reference

NUM_NEW = 20


def context(prompt: list[int], *, echo: bool = False) -> TextContext:
    return TextContext(
        request_id=RequestID(),
        tokens=TokenBuffer(prompt),
        max_length=200,
        sampling_params=SamplingParams(temperature=0.0, max_new_tokens=NUM_NEW),
        log_probabilities=1 if echo else None,
        log_probabilities_echo=echo,
    )


def greedy(reference: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        output = reference.generate(
            ids, attention_mask=mask, max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None
        )
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def prompt_entries(outputs: list[TextGenerationOutput]) -> list[tuple[int, float] | None]:
    entries = [entry for output in outputs for entry in output.prompt_log_probabilities or []]
    return [entry and (entry.token_id, round(entry.log_probability, 3)) for entry in entries]


@asynccontextmanager
async def serving(pipeline: Any, num_blocks: int) -> AsyncIterator[tuple[GenerationLoop, PagedKVCacheManager]]:
    manager = PagedKVCacheManager(pipeline.kv_manager.params, num_blocks)
    loop = GenerationLoop(pipeline, LocalKVCacheClient(manager), SchedulerLimits(4, 12, 20, 8))
    task = asyncio.create_task(loop.run())
    yield loop, manager
    while manager.num_free_blocks < num_blocks:
        await asyncio.sleep(0.01)
    manager.assert_invariants()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.fixture(scope="module")
def pipeline(tiny_llama: Path) -> Any:
    torch.set_num_threads(1)
    config = PipelineConfig(
        model_path=str(tiny_llama), num_threads=1, devices="cpu", kv_cache_page_size=4, max_length=200, max_batch_size=4
    )
    return PIPELINE_REGISTRY.retrieve(config)[1]


async def test_everybody_gets_the_tokens_of_hugging_face(tiny_llama: Path, pipeline: Any) -> None:
    reference = load_reference(tiny_llama)
    rng = np.random.default_rng(0)
    family = rng.integers(5, 250, 40).tolist()
    prompts = [
        family[:n] + rng.integers(5, 250, m).tolist() for n, m in [(0, 5), (12, 1), (13, 9), (30, 2), (8, 20), (40, 1)]
    ]

    async def one(loop: GenerationLoop, prompt: list[int]) -> list[int]:
        return [token async for output in loop.submit(context(prompt)) for token in output.tokens]

    async with serving(pipeline, num_blocks=24) as (loop, _):
        given_up = loop.submit(context(family))
        answers = await asyncio.gather(*(one(loop, prompt) for prompt in prompts), anext(given_up))
        await given_up.aclose()
    assert answers[:-1] == [greedy(reference, prompt) for prompt in prompts]
    stats = loop.stats
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0
    assert stats.runs < stats.steps, "some runs had several steps"
    assert stats.steps < sum(-(-len(p) // 12) + NUM_NEW for p in prompts), "requests shared steps"


async def test_echo_reports_each_prompt_token_once_though_it_was_chunked_and_preempted(pipeline: Any) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(5, 250, 30).tolist() for _ in range(3)]
    alone = []
    for prompt in prompts:
        row = context(prompt, echo=True)
        output = pipeline.execute(TextGenerationInputs(batches=[[row]]))[row.request_id]
        pipeline.release(row.request_id)
        alone.append(prompt_entries([output]))
    assert [len(entries) for entries in alone] == [30] * 3

    async def one(loop: GenerationLoop, prompt: list[int]) -> list[TextGenerationOutput]:
        return [output async for output in loop.submit(context(prompt, echo=True))]

    async with serving(pipeline, num_blocks=26) as (loop, _):
        answers = await asyncio.gather(*(one(loop, prompt) for prompt in prompts))
    assert [prompt_entries(outputs) for outputs in answers] == alone
    assert loop.stats.preemptions > 0

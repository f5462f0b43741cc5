"""Random traffic through one pipeline with a small cache: arrivals, chunks, runs of several steps, resets, releases.

Whatever happens to a request on its way, its tokens are those that Hugging Face generates greedily, and in the end
no block is missing.
"""

from __future__ import annotations

import numpy as np
import pytest

from max_ray.errors import InsufficientBlocksError
from max_ray.interfaces import TextContext
from max_ray.pipelines.text_generation import TextGenerationPipeline
from tests.pipelines.conftest import Lab, execute, make_context, random_prompt

PAGE_SIZE = 4
BYTES_PER_BLOCK = 2 * 2 * 2 * 16 * 4 * PAGE_SIZE  # keys and values, layers, KV heads, head_dim, float32
NUM_BLOCKS = 28
MAX_NEW_TOKENS = 24


def arrival(rng: np.random.Generator) -> TextContext:
    """A prompt from few families, so that many share a prefix of some pages."""
    family = random_prompt(60, seed=7 + int(rng.integers(2)))
    prompt = family[: int(rng.choice([1, 3, 4, 5, 8, 9, 14, 24]))]
    return make_context(prompt, max_new_tokens=int(rng.integers(1, MAX_NEW_TOKENS + 1)))


def batch_of(rng: np.random.Generator, running: list[TextContext]) -> list[TextContext]:
    """Some of the running requests, some of them limited to a chunk."""
    batch = [context for context in running if rng.random() < 0.8] or running[:1]
    for context in batch:
        if context.active_length > 1 and rng.random() < 0.5:
            context.chunk(int(rng.integers(1, 12)))
    return batch


def preempt(pipeline: TextGenerationPipeline, context: TextContext) -> None:
    pipeline.release(context.request_id)
    context.reset()


@pytest.mark.parametrize("seed", range(3))
def test_every_request_gets_its_greedy_tokens(lab: Lab, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pipeline = lab.pipeline(
        PAGE_SIZE, kv_cache_memory=NUM_BLOCKS * BYTES_PER_BLOCK / 1024**3, max_length=NUM_BLOCKS * PAGE_SIZE
    )
    manager = pipeline.kv_manager
    assert manager.total_num_blocks == NUM_BLOCKS
    running: list[TextContext] = []
    finished: list[TextContext] = []
    num_refused = num_preempted = 0
    for now in range(100):
        running += [arrival(rng) for _ in range(rng.integers(0, 4)) if now < 80 and len(running) < 6]
        if not running:
            continue
        try:
            execute(pipeline, batch_of(rng, running), num_steps=int(rng.integers(1, 6)))
        except InsufficientBlocksError:
            num_refused += 1
            preempt(pipeline, running[-1])
        if rng.random() < 0.15:
            num_preempted += 1
            preempt(pipeline, running[int(rng.integers(len(running)))])
        done = [context for context in running if context.is_done]
        for context in done:
            pipeline.release(context.request_id)
        finished += done
        running = [context for context in running if not context.is_done]
        manager.assert_invariants()
    assert len(finished) >= 15
    assert num_preempted
    assert num_refused
    for context in finished:
        generated = context.tokens.generated.tolist()
        assert generated == lab.greedy(context.tokens.prompt.tolist(), MAX_NEW_TOKENS)[: len(generated)]
    for context in running:
        pipeline.release(context.request_id)
    assert manager.num_free_blocks == NUM_BLOCKS
    assert manager.metrics.cache_hit_tokens > 0

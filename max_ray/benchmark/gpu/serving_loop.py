"""Step `loop`: the product's scheduling loop over a worker in this process: requests in, tokens out, without HTTP.

Beside step `offline`, which runs the same model without a scheduler, it shows what the boundaries of runs cost.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from max_ray.benchmark.case_log import CaseLog
from max_ray.benchmark.gpu.flags import device_and_dtype, parse
from max_ray.benchmark.shapes import load_shape
from max_ray.benchmark.synthetic import PAGE_SIZE, blocks_for, build_runner
from max_ray.benchmark.timing import synchronize
from max_ray.engine.local_executor import LocalExecutor
from max_ray.engine.runner import ModelRunner
from max_ray.interfaces import KVCacheParams, RequestID, SamplingParams, TextContext, TokenBuffer
from max_ray.kv_cache import LocalKVCacheClient, PagedKVCacheManager
from max_ray.pipelines.text_generation import TextGenerationPipeline
from max_ray.scheduler import GenerationLoop, SchedulerLimits


@dataclass(frozen=True)
class Load:
    """Requests that are all sent at once. max_batch_size: of them that run at a time; the others wait."""

    name: str
    num_requests: int
    max_batch_size: int
    prompt: int
    new: int
    sampling: dict[str, Any]


ON_GPU = (
    Load("1 request", 1, 256, 1024, 128, {"temperature": 0.0}),
    Load("64 requests", 64, 256, 512, 128, {"temperature": 0.0}),
    Load("64 requests, top-p", 64, 256, 512, 128, {"temperature": 0.8, "top_p": 0.95}),
    Load("512 requests, 256 at a time", 512, 256, 256, 128, {"temperature": 0.0}),
)
ON_CPU = (
    Load("1 request", 1, 2, 5, 3, {"temperature": 0.0}),
    Load("3 requests, 2 at a time", 3, 2, 5, 3, {"temperature": 0.8, "top_p": 0.95}),
)


async def serve(runner: ModelRunner, load: Load, params: KVCacheParams, vocab_size: int) -> dict[str, Any]:
    """Rates of one load. Raises AssertionError when a request gets too few tokens or a block is not given back."""
    manager = PagedKVCacheManager(params, runner.num_blocks, enable_prefix_caching=False)
    pipeline = TextGenerationPipeline(LocalExecutor([runner]))
    limits = SchedulerLimits(load.max_batch_size, 8192, load.num_requests, 64)
    loop = GenerationLoop(pipeline, LocalKVCacheClient(manager), limits)
    task = asyncio.create_task(loop.run())
    start, first_s, counts = time.perf_counter(), [], []

    async def one(index: int) -> None:
        prompt = np.random.default_rng(index).integers(5, vocab_size, load.prompt).tolist()
        count = 0
        async for output in loop.submit(_context(prompt, load, index)):
            if not count and len(output.tokens):
                first_s.append(time.perf_counter() - start)
            count += len(output.tokens)
        counts.append(count)

    await asyncio.gather(*(one(index) for index in range(load.num_requests)))
    wall_s, stats = time.perf_counter() - start, loop.stats
    while manager.num_free_blocks < runner.num_blocks:
        await asyncio.sleep(0.01)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert counts == [load.new] * load.num_requests, f"requests got {sorted(set(counts))} tokens, not {load.new}"
    return {
        "tokens_per_s": sum(counts) / wall_s,
        "wall_total_s": wall_s,
        "median_first_token_s": median(first_s),
        "runs": stats.runs,
        "steps": stats.steps,
        "steps_a_run": stats.steps / max(1, stats.runs),
    }


def _context(prompt: list[int], load: Load, seed: int) -> TextContext:
    return TextContext(
        request_id=RequestID(),
        tokens=TokenBuffer(prompt),
        max_length=load.prompt + load.new + 1,
        sampling_params=SamplingParams(max_new_tokens=load.new, seed=seed, **load.sampling),
    )


def _params(config: dict[str, Any], dtype: str) -> KVCacheParams:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return KVCacheParams(dtype, config["num_hidden_layers"], kv_heads, head_dim, PAGE_SIZE)


def _measure(runner: ModelRunner, load: Load, params: KVCacheParams, vocab_size: int) -> dict[str, Any]:
    """The second of two rounds: the first captures graphs and compiles."""
    asyncio.run(serve(runner, load, params, vocab_size))
    result = asyncio.run(serve(runner, load, params, vocab_size))
    print(f"  {load.name}: {result['tokens_per_s']:.0f} tokens/s, {result['steps_a_run']:.1f} steps a run", flush=True)
    return result


def main(arguments: list[str] | None = None) -> int:
    options: argparse.Namespace = parse("serving_loop", arguments)
    device, dtype = device_and_dtype(options)
    config = load_shape(options.shape)
    loads = ON_GPU if device.type == "cuda" else ON_CPU
    longest = max(load.prompt + load.new + 1 for load in loads)
    max_rows = max(load.max_batch_size for load in loads)
    num_blocks = max_rows * (blocks_for(longest) + 1)
    runner = build_runner(
        config, "architectures.llama3", dtype, device, max_rows=max_rows, max_length=longest, num_blocks=num_blocks
    )
    log = CaseLog.from_environment("loop", partial(synchronize, device))
    params = _params(config, options.dtype)
    for load in loads:
        log.run(load.name, partial(_measure, runner, load, params, config["vocab_size"]))
    log.finish()
    return 1 if log.failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Step `profile`: where the time of a step goes: device time by kernel, and the host's time to launch a step."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from max_ray.benchmark.case_log import CaseLog
from max_ray.benchmark.gpu.flags import device_and_dtype, parse
from max_ray.benchmark.shapes import load_shape
from max_ray.benchmark.synthetic import blocks_for, build_runner, run_request
from max_ray.benchmark.timing import synchronize
from max_ray.engine.runner import ModelRunner

_STEPS = 5
_WARM_STEPS = 4
_ROWS_OF_TABLE = 15


def decode(runner: ModelRunner, rows: int, context: int, vocab_size: int) -> dict[str, Any]:
    """Device time by kernel of decode steps."""
    request = run_request(rows, context - 1, 1, _WARM_STEPS + _STEPS + 2, vocab_size)
    for _ in runner.run(request):  # compiles, captures
        pass
    outputs = runner.run(request)
    for _ in islice(outputs, _WARM_STEPS):
        pass
    result = _profiled(lambda: [None for _ in islice(outputs, _STEPS)], runner, _STEPS)
    for _ in outputs:
        pass
    return result


def prefill(runner: ModelRunner, tokens: int, vocab_size: int) -> dict[str, Any]:
    """Device time by kernel of one prompt, and the host's time until its first token is there."""
    request = run_request(1, 0, tokens, 1, vocab_size)
    for _ in range(2):
        start = time.perf_counter()
        for _ in runner.run(request):
            pass
        whole_s = time.perf_counter() - start
    return _profiled(lambda: list(runner.run(request)), runner, 1) | {"first_token_s": whole_s}


def _profiled(function: Any, runner: ModelRunner, steps: int) -> dict[str, Any]:
    device = runner.storage.keys[0].device
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    start = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profile:
        function()
        synchronize(device)
    wall_s = time.perf_counter() - start
    averages = profile.key_averages()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(averages.table(sort_by=key, row_limit=_ROWS_OF_TABLE, max_name_column_width=60), flush=True)
    events = sorted(averages, key=lambda event: -float(getattr(event, key)))[:_ROWS_OF_TABLE]
    by_kernel = {event.key[:80]: [getattr(event, key) / steps, event.count / steps] for event in events}
    busy_us = sum(float(getattr(event, key)) for event in averages) / steps
    return {"us_and_calls_a_step": by_kernel, "busy_us_a_step": busy_us, "wall_us_a_step": wall_s * 1e6 / steps}


def main(arguments: list[str] | None = None) -> int:
    options: argparse.Namespace = parse("profile", arguments)
    device, dtype = device_and_dtype(options)
    config = load_shape(options.shape)
    batches, context, prompt = ((1, 256), 1024, 8192) if device.type == "cuda" else ((1, 2), 16, 18)
    longest = max(context + _WARM_STEPS + _STEPS + 3, prompt + 1)
    per_row = blocks_for(context + _WARM_STEPS + _STEPS + 3)
    runner = build_runner(
        config, "architectures.llama3", dtype, device,
        max_rows=max(batches), max_length=longest, num_blocks=max(max(batches) * per_row, blocks_for(prompt + 1)),
    )  # fmt: skip
    log = CaseLog.from_environment("profile", partial(synchronize, device))
    for batch in batches:
        log.run(f"decode, batch {batch}", partial(decode, runner, batch, context, config["vocab_size"]))
    log.run(f"prefill, {prompt} tokens", partial(prefill, runner, prompt, config["vocab_size"]))
    log.finish()
    return 1 if log.failed else 0


if __name__ == "__main__":
    sys.exit(main())

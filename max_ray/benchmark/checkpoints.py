"""Checkpoints beside each other, in this process: `python -m max_ray.benchmark.checkpoints MODEL [MODEL ...]`.

    python -m max_ray.benchmark.checkpoints llama-1b llama-1b-q4_k_m.gguf --batch 1,16

Each round times a run of decode steps of the one, then of the others, so that all meet the same machine; ratios are to
the last model. What a server adds is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import median

import torch

from max_ray.benchmark.aligned import line
from max_ray.benchmark.device_flags import check_positive, numbers
from max_ray.benchmark.two_families import by_turns
from max_ray.engine.runner import ModelRunner
from max_ray.errors import ConfigError, MaxRayError
from max_ray.pipelines import PipelineConfig, PipelinePlan, resolve_plan
from max_ray.pipelines.factory import build_local_runners

_HEAD = ("model", "encoding", "rows", "tokens/s", "fastest round", "ratio")
_WIDTHS = (34, 16, 6, 12, 15, 7)


def load(model: str, batch: int, length: int) -> tuple[ModelRunner, PipelinePlan]:
    """A model as a start would load it. Raises ConfigError where it generates no text."""
    plan = resolve_plan(PipelineConfig(model_path=model, max_length=length, max_batch_size=batch))
    torch.set_num_threads(plan.num_threads)
    (runner,) = build_local_runners(plan)
    if not isinstance(runner, ModelRunner):
        raise ConfigError(f"{model} is an embedding model: it has no decode steps.")
    return runner, plan


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after a mistake of the user."""
    parser = argparse.ArgumentParser(prog="python -m max_ray.benchmark.checkpoints", allow_abbrev=False)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL")
    add("--batch", default="1,16", metavar="N,N", help="Rows. Default: 1,16.")
    add("--context", type=int, default=128, metavar="N", help="Tokens of a row before decoding. Default: 128.")
    add("--steps", type=int, default=32, metavar="N", help="Decode steps of a round. Default: 32.")
    add("--rounds", type=int, default=5, metavar="N", help="Rounds. Default: 5.")
    options = parser.parse_args(arguments)
    try:
        check_positive(context=options.context, steps=options.steps, rounds=options.rounds)
        batches = numbers(options.batch)
        loaded = [load(model, max(batches), options.context + options.steps + 1) for model in options.models]
    except MaxRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(line(_HEAD, _WIDTHS))
    runners = [runner for runner, _ in loaded]
    vocab_size = min(plan.huggingface_config.vocab_size for _, plan in loaded)
    for rows in batches:
        times = by_turns(runners, rows, options.context, options.steps, vocab_size, options.rounds)
        last = median(times[-1])
        for model, (_, plan), seconds in zip(options.models, loaded, times, strict=True):
            rates = (f"{rows / median(seconds):.1f}", f"{rows / min(seconds):.1f}")
            print(
                line((model[-33:], plan.encoding.value, rows, *rates, f"{last / median(seconds):.2f}"), _WIDTHS),
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

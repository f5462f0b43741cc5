"""Two families on the same weights, in this process: decode rates by turns, so that both meet the same machine.

    python -m max_ray.benchmark.two_families --shape llama-160m --batch 16

holds our own family (`--first`, by default what the shape's class has) against the adapter to transformers' code. Each
round times a run of decode steps of the one, then of the other; the ratio is that of the medians, and of the fastest.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median
from typing import Any

from max_ray.benchmark.aligned import line, write_results
from max_ray.benchmark.device_flags import check_positive
from max_ray.benchmark.shapes import load_shape
from max_ray.benchmark.synthetic import blocks_for, build_runner, run_request
from max_ray.benchmark.timing import choose_device, choose_dtype
from max_ray.engine.runner import ModelRunner
from max_ray.errors import MaxRayError

ADAPTER = "architectures.transformers_adapter"
_OWN = {"LlamaForCausalLM": "architectures.llama3", "Qwen3ForCausalLM": "architectures.qwen"}
_WIDTHS = (36, 14, 16)


def run(options: dict[str, Any]) -> None:
    """Prints tokens a second of both, and the ratios. Raises ConfigError."""
    config, device, dtype = (
        load_shape(options["shape"]),
        choose_device(options["device"]),
        choose_dtype(options["dtype"]),
    )
    batch, context, steps, rounds = (options[name] for name in ("batch", "context", "steps", "rounds"))
    check_positive(batch=batch, context=context, steps=steps, rounds=rounds)
    first = options["first"] or _OWN.get(config["architectures"][0], ADAPTER)
    families = [first, options["second"]]
    length = context + steps + 1
    blocks = batch * blocks_for(length)
    runners = [
        build_runner(config, family, dtype, device, max_rows=batch, max_length=length, num_blocks=blocks)
        for family in families
    ]
    times = by_turns(runners, batch, context, steps, config["vocab_size"], rounds)
    print(line((f"decode, batch {batch}, tokens/s", "median", "fastest round"), _WIDTHS))
    for family, seconds in zip(families, times, strict=True):
        print(line((family, f"{batch / median(seconds):.1f}", f"{batch / min(seconds):.1f}"), _WIDTHS))
    ours, theirs = times
    ratios = [f"{median(theirs) / median(ours):.2f}", f"{min(theirs) / min(ours):.2f}"]
    print(line(("ratio", *ratios), _WIDTHS))
    report = {"benchmark": "two families", "shape": options["shape"], "dtype": options["dtype"], "batch": batch}
    write_results(options["json"], report | {"seconds_a_step": dict(zip(families, times, strict=True))})


def by_turns(
    runners: list[ModelRunner], rows: int, context: int, steps: int, vocab_size: int, rounds: int
) -> list[list[float]]:
    """Seconds of a decode step in each round, for each runner; one round before the first warms up."""
    times: list[list[float]] = [[] for _ in runners]
    for turn in range(rounds + 1):
        for runner, seconds in zip(runners, times, strict=True):
            outputs = runner.run(run_request(rows, context - 1, 1, steps + 1, vocab_size))
            next(outputs)
            start, num_steps = time.perf_counter(), sum(1 for _ in outputs)
            if turn:
                seconds.append((time.perf_counter() - start) / num_steps)
    return times


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 2 after a mistake of the user."""
    parser = argparse.ArgumentParser(prog="python -m max_ray.benchmark.two_families", allow_abbrev=False)
    add = parser.add_argument
    add("--shape", default="llama-160m", metavar="NAME", help="As of `offline`. Default: llama-160m.")
    add("--first", metavar="MODULE", help="Module with ARCHITECTURES. Default: our family of the shape's class.")
    add("--second", default=ADAPTER, metavar="MODULE", help=f"The other. Default: {ADAPTER}.")
    add("--device", metavar="NAME", help="cuda or cpu. Default: a GPU where there is one.")
    add("--dtype", default="bfloat16", metavar="NAME", help="bfloat16, float16 or float32. Default: bfloat16.")
    add("--batch", type=int, default=16, metavar="N", help="Rows. Default: 16.")
    add("--context", type=int, default=128, metavar="N", help="Tokens of a row before decoding. Default: 128.")
    add("--steps", type=int, default=16, metavar="N", help="Decode steps of a round. Default: 16.")
    add("--rounds", type=int, default=5, metavar="N", help="Rounds. Default: 5.")
    add("--json", metavar="FILE", help="Write the results.")
    try:
        run(vars(parser.parse_args(arguments)))
    except MaxRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`max-ray benchmark offline`: a model with random weights in this process: decode and prefill rates by batch size.

Needs torch, transformers (and, on a GPU, triton), neither Ray nor pydantic, and no checkpoint:

    python -m max_ray.benchmark.offline

The runner is the product's own: scheduling and HTTP are all that is left out. `roofline` is what the machine's copy
rate and matmul peak allow: a step reads all weights once and the keys and values of every row, and multiplies. The peer
runs afterwards, in memory that is free again.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from max_ray.benchmark.aligned import line, write_results
from max_ray.benchmark.case_log import CaseLog
from max_ray.benchmark.device_flags import add_offline_flags, check_positive, numbers
from max_ray.benchmark.shapes import load_shape
from max_ray.benchmark.synthetic import blocks_for, build_runner, run_request, transformers_model
from max_ray.benchmark.timing import Machine, choose_device, choose_dtype, synchronize
from max_ray.benchmark.transformers_peer import TransformersPeer
from max_ray.engine.runner import ModelRunner
from max_ray.errors import ConfigError, MaxRayError

_HEAD = ("", "tokens/s", "ms", "roofline", "of it", "transformers", "ratio")
_WIDTHS = (30, 12, 10, 12, 9, 14, 9)
_WARM_STEPS = 4  # of a run, before the clock starts: graphs are captured and the lookahead is full


@dataclass(frozen=True)
class Work:
    """What a step needs at least. body, head: weights that every token meets, and those that only sampled ones do
    (an embedding is read a row a token: nothing). The other two: of one token of context, all layers."""

    body: int
    head: int
    weight_size: int
    kv_bytes: int
    attention_flops: int

    @classmethod
    def of(cls, config: dict[str, Any], dtype: torch.dtype) -> Work:
        theirs = transformers_model(config, dtype, "meta")
        ends = {id(theirs.get_input_embeddings().weight), id(theirs.get_output_embeddings().weight)}
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            body=sum(x.numel() for x in theirs.parameters() if id(x) not in ends),
            head=theirs.get_output_embeddings().weight.numel(),
            weight_size=dtype.itemsize,
            kv_bytes=2 * layers * (config.get("num_key_value_heads") or heads) * head_dim * dtype.itemsize,
            attention_flops=4 * layers * heads * head_dim,
        )

    def decode_floor_s(self, machine: Machine, rows: int, context: float) -> float:
        """Seconds of a step that reads all weights once, and the keys and values of each row."""
        weights = self.body + self.head
        nbytes = weights * self.weight_size + rows * context * self.kv_bytes
        return machine.floor_s(nbytes, rows * (2 * weights + context * self.attention_flops))

    def prefill_floor_s(self, machine: Machine, tokens: int) -> float:
        """Seconds of one prompt, of whose last token logits are wanted."""
        flops = 2 * (tokens * self.body + self.head) + tokens * (tokens + 1) // 2 * self.attention_flops
        return machine.floor_s((self.body + self.head) * self.weight_size + tokens * self.kv_bytes, flops)


def decode_step_s(runner: ModelRunner, rows: int, context: int, steps: int, vocab_size: int) -> float:
    """Median seconds of a decode step, greedy, of three runs; the first run warms up."""
    request = run_request(rows, context - 1, 1, steps + _WARM_STEPS + 1, vocab_size)

    def timed() -> float:
        outputs = runner.run(request)
        for _ in range(_WARM_STEPS):
            next(outputs)
        start, num_steps = time.perf_counter(), sum(1 for _ in outputs)
        return (time.perf_counter() - start) / num_steps

    timed()
    return median(timed() for _ in range(3))


def prefill_s(runner: ModelRunner, tokens: int, vocab_size: int) -> float:
    """Median seconds from handing a prompt over to its first token on the host."""
    request = run_request(1, 0, tokens, 1, vocab_size)

    def timed() -> float:
        start = time.perf_counter()
        for _ in runner.run(request):
            pass
        return time.perf_counter() - start

    timed()
    return median(timed() for _ in range(3))


def run(options: dict[str, Any]) -> None:
    """Prints results as they come, then all of them as a table. Raises ConfigError."""
    device, dtype = choose_device(options["device"]), choose_dtype(options["dtype"])
    shape = options["shape"] or ("llama-8b" if device.type == "cuda" else "tiny")
    config, batches = load_shape(shape), numbers(options["batches"])
    context, steps, prompt = options["context"], options["steps"], options["prompt"]
    check_positive(context=context, steps=steps, prompt=prompt)
    if options["peer"] not in ("transformers", "none"):
        raise ConfigError(f"--peer {options['peer']}: the peers are transformers and none.")
    with torch.inference_mode():
        machine = Machine.measure(device, dtype)
    print("\n".join([f"offline, {shape}, {options['dtype']}", *machine.lines()]), flush=True)
    work = Work.of(config, dtype)
    results: list[dict[str, Any]] = []
    report = {"benchmark": "offline", "shape": shape, "dtype": options["dtype"], "context": context, "prompt": prompt}
    report |= {"machine": machine.as_json(), "results": results}
    log = CaseLog.from_environment("offline", partial(synchronize, device))
    for case in _ours(options, config, machine, work, device, dtype, batches):
        result = log.run(*case)
        if result is not None:
            results.append(result)
        write_results(options["json"], report)
    log.finish()
    if log.failed:
        raise MaxRayError(f"These measurements failed: {', '.join(log.failed)}.")
    if options["peer"] == "transformers":
        _add_peer(results, config, dtype, device, context, steps, time.monotonic() + options["peer_budget"])
        write_results(options["json"], report)
    print("\n" + "\n".join([line(_HEAD, _WIDTHS), *map(_line, results)]))


def _ours(
    options: dict[str, Any],
    config: dict[str, Any],
    machine: Machine,
    work: Work,
    device: torch.device,
    dtype: torch.dtype,
    batches: list[int],
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names of the cases and what measures them, over one runner."""
    context, steps, prompt = options["context"], options["steps"], options["prompt"]
    longest = context + steps + _WARM_STEPS + 1
    runner = build_runner(
        config,
        options["family"],
        dtype,
        device,
        max_rows=max(batches),
        max_length=max(longest, prompt + 1),
        num_blocks=max(max(batches) * blocks_for(longest), blocks_for(prompt + 1)),
    )
    vocab_size = config["vocab_size"]

    def decode(batch: int) -> dict[str, Any]:
        step_s = decode_step_s(runner, batch, context, steps, vocab_size)
        floor = work.decode_floor_s(machine, batch, context + steps / 2)
        return _result(f"decode, batch {batch}", batch, batch, step_s, floor)

    def prefill() -> dict[str, Any]:
        step_s = prefill_s(runner, prompt, vocab_size)
        return _result(f"prefill, {prompt} tokens", prompt, 1, step_s, work.prefill_floor_s(machine, prompt))

    for batch in batches:
        yield f"decode, batch {batch}", partial(decode, batch)
    yield f"prefill, {prompt} tokens", prefill


def _result(name: str, tokens: int, batch: int, time_s: float, floor_s: float) -> dict[str, Any]:
    print(f"  {name}: {tokens / time_s:.1f} tokens/s, {floor_s / time_s:.1%} of the roofline", flush=True)
    return {
        "case": name,
        "tokens": tokens,
        "batch": batch,
        "seconds": time_s,
        "tokens_per_s": tokens / time_s,
        "roofline_tokens_per_s": tokens / floor_s,
        "share_of_roofline": floor_s / time_s,
        "transformers_tokens_per_s": None,
    }


def _add_peer(
    results: list[dict[str, Any]],
    config: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    context: int,
    steps: int,
    deadline: float,
) -> None:
    """Fills in the peer's numbers, the prompt's first; what does not begin before the deadline stays None."""
    _free_memory(device)
    peer = TransformersPeer(config, dtype, device)
    for result in sorted(results, key=lambda result: not result["case"].startswith("prefill")):
        if time.monotonic() > deadline:
            print(f"  transformers, {result['case']}: not measured, --peer-budget is spent", flush=True)
            continue
        is_prefill = result["case"].startswith("prefill")
        result["transformers_tokens_per_s"] = (
            peer.prefill_tokens_per_s(result["tokens"])
            if is_prefill
            else peer.decode_tokens_per_s(result["batch"], context, steps)
        )
        print(f"  transformers, {result['case']}: {result['transformers_tokens_per_s']:.1f} tokens/s", flush=True)


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _line(result: dict[str, Any]) -> str:
    theirs = result["transformers_tokens_per_s"]
    cells = [result["case"], f"{result['tokens_per_s']:.1f}", f"{result['seconds'] * 1e3:.3f}"]
    cells += [f"{result['roofline_tokens_per_s']:.1f}", f"{result['share_of_roofline']:.1%}"]
    cells += ["-", "-"] if theirs is None else [f"{theirs:.1f}", f"{result['tokens_per_s'] / theirs:.2f}"]
    return line(cells, _WIDTHS)


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 2 after a mistake of the user."""
    parser = argparse.ArgumentParser(prog="python -m max_ray.benchmark.offline", allow_abbrev=False)
    add_offline_flags(parser)
    try:
        run(vars(parser.parse_args(arguments)))
    except MaxRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Step `probe`: what decides a decode step's speed and is measured nowhere else.

Products with each of a model's weights at few rows, the gap between two kernels of a graph and the host's cost of a
launch, attention at several lengths with many and few key heads and with skewed lengths, prompts with and without a
prefix, prompts beside decode rows, and a layer of experts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from max_ray.benchmark.case_log import CaseLog
from max_ray.benchmark.gpu.experts_case import QWEN3_30B, TINY, experts_case
from max_ray.benchmark.gpu.flags import device_and_dtype, parse
from max_ray.benchmark.kernel_cases import CaseFactory, CaseMaker, Sizes
from max_ray.benchmark.kernels import measure_cases
from max_ray.benchmark.shapes import load_shape
from max_ray.benchmark.timing import Machine, seconds, synchronize
from max_ray.kernels.gpu.empty import add_one

_NODES = 350  # of a decode step's graph
_FEW_KEY_HEADS = 8  # ranks that share a model's key heads, as under tensor parallelism


def product_cases(sizes: Sizes, make: CaseFactory, rows: Sequence[int]) -> Iterator[tuple[str, CaseMaker]]:
    """Of the five weights of a dense model."""
    heads, kv_heads, head_dim = sizes.heads, sizes.kv_heads, sizes.head_dim
    weights = {
        "qkv": ((heads + 2 * kv_heads) * head_dim, sizes.hidden),
        "o": (sizes.hidden, heads * head_dim),
        "gate_up": (2 * sizes.inner, sizes.hidden),
        "down": (sizes.hidden, sizes.inner),
        "lm_head": (sizes.vocab, sizes.hidden),
    }
    for num_rows in rows:
        for name, shape in weights.items():
            yield f"linear {name} {num_rows}", partial(make.linear, num_rows, *shape)


def attention_cases(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, CaseMaker]]:
    """sizes.context: a long row; others are parts of it."""
    long, short = sizes.context, max(2, sizes.context // 128)
    medium = max(2, sizes.context // 16)
    few = replace(sizes, heads=max(1, sizes.heads // _FEW_KEY_HEADS), kv_heads=1)
    for name, heads in (("", sizes), (", 1 key head", few)):
        make = CaseFactory(heads, device, dtype)
        for length in (short, medium, long):
            yield f"attention decode 1 x {length}{name}", partial(make.attention, [(length - 1, 1)])
    make, num_rows = CaseFactory(sizes, device, dtype), max(sizes.rows)
    decode = [(short - 1, 1)] * (num_rows - 1)
    skewed = [*decode, (long // 2 - 1, 1)]
    yield f"attention decode {num_rows} x {short}", partial(make.attention, [(short - 1, 1)] * num_rows)
    yield f"attention decode {num_rows - 1} x {short} + 1 x {long // 2}", partial(make.attention, skewed)
    yield f"attention prefill 1 x {medium}", partial(make.attention, [(0, medium)])
    after = max(1, medium * 3 // 4)
    chunks = [(after, medium // 4 or 1)] * 4
    yield f"attention prefill 4 x {medium // 4} after {after}", partial(make.attention, chunks)
    mixed = [*decode, (0, medium // 4 or 1)]
    yield f"attention {num_rows - 1} x {short} + prefill {medium // 4}", partial(make.attention, mixed)
    yield f"latent attention prefill 1 x {medium // 4}", partial(make.latent_attention, [(0, medium // 4 or 2)])
    yield f"latent attention prefill after {after}", partial(make.latent_attention, [(after, medium // 4 or 2)])


def expert_cases(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, CaseMaker]]:
    sizes = QWEN3_30B if device.type == "cuda" else TINY
    for rows in (1, 8, 64, 256) if device.type == "cuda" else (1, 5):
        yield f"experts {rows} of {sizes.num_experts}", partial(experts_case, rows, sizes, device, dtype)


def node_gap(device: torch.device) -> dict[str, Any]:
    """Time of one node of a graph that does nothing, and of one launch on the host without a graph."""
    x = torch.zeros(1, dtype=torch.int32, device=device)
    add_one(x)
    nodes = _NODES if device.type == "cuda" else 3

    def all_nodes() -> None:
        for _ in range(nodes):
            add_one(x)

    node_s = seconds([all_nodes], device) / nodes
    synchronize(device)
    start = time.perf_counter()
    all_nodes()
    launch_s = (time.perf_counter() - start) / nodes
    before = int(x.item())
    all_nodes()
    print(f"  node {node_s * 1e6:.2f} us, launch on the host {launch_s * 1e6:.2f} us", flush=True)
    return {"node_s": node_s, "launch_s": launch_s, "agrees": int(x.item()) == before + nodes}


def argmax(rows: int, vocab: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The draw of greedy rows."""
    logits = torch.randn(rows, vocab, device=device).to(dtype)
    return {"seconds": seconds([lambda: logits.argmax(-1)], device)}


def main(arguments: list[str] | None = None) -> int:
    options: argparse.Namespace = parse("probe", arguments)
    device, dtype = device_and_dtype(options)
    on_gpu = device.type == "cuda"
    rows, context = ((1, 8, 16, 64, 256), 131_072) if on_gpu else ((1, 3), 256)
    sizes = Sizes.of(load_shape(options.shape), 1, context, (64,) if on_gpu else (3,))
    log = CaseLog.from_environment("probe", partial(synchronize, device))
    with torch.inference_mode():
        machine = Machine.measure(device, dtype)
        log.run("node gap", partial(node_gap, device))
        measure_cases(product_cases(sizes, CaseFactory(sizes, device, dtype), rows), machine, device, log)
        measure_cases(attention_cases(sizes, device, dtype), machine, device, log)
        measure_cases(expert_cases(device, dtype), machine, device, log)
        for num_rows in rows:
            log.run(f"argmax {num_rows}", partial(argmax, num_rows, sizes.vocab, device, dtype))
    log.finish()
    return 1 if log.failed else 0


if __name__ == "__main__":
    sys.exit(main())

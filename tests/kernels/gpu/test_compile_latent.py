"""Attention over latents compiles for sm_90 without a GPU and keeps its values in registers; -s prints what it needs.

python -m pytest tests/kernels/gpu/test_compile_latent.py -s
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from max_ray.kernels.gpu import decode, latent, latent_expanded, latent_kernels, paged_cache
from max_ray.kernels.gpu.launch import padded
from tests.kernels.gpu.sm90 import Usage, compile_for_sm90

SHARED_LIMIT = 227 * 1024  # bytes a block, compute capability 9.0
PARTIAL = ["partial_acc", "partial_largest", "partial_total"]


@pytest.fixture(autouse=True)
def _nothing_from_earlier_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def show(name: str, usage: Usage) -> None:
    print(f"\n{name}: {usage.registers} registers, {usage.stack} bytes of stack, {usage.shared} bytes shared", end="")


def compiled(kernel: Any, heads: int, tile: latent.Tile, dtype: str, latent_dim: int, rope_dim: int) -> Usage:
    """Pages of 16."""
    tensors = dict.fromkeys(["q_latent", "q_rope", "cache", "out"], f"*{dtype}") | dict.fromkeys(PARTIAL, "*fp32")
    indices = dict.fromkeys(["block_tables", "cache_lengths", "qo_indptr", "rows"], "*i32")
    strides = [f"{part}_{axis}_stride" for part in ("latent", "rope") for axis in ("token", "head")]
    sizes = dict.fromkeys(strides, "i32:16") | {
        "table_stride": "i32",
        "num_heads": "i32:16" if heads % 16 == 0 else "i32",
    }
    sizes |= {
        "out_largest": "*fp32",
        "num_rows": "i32",
        "scale": "fp32",
        "HEADS": tile.heads,
        "PAGE_SIZE": 16,
        "NUM_SPLITS": 8,
    }
    sizes |= {"ONLY_SINGLE": False, "LATENT_DIM": latent_dim, "ROPE_DIM": rope_dim, "BLOCK_Q": tile.lines // tile.heads}
    blocks = {"BLOCK_M": tile.lines, "BLOCK_N": tile.keys, "BLOCK_R": padded(rope_dim, 16)}
    arguments: dict[str, Any] = tensors | indices | sizes | blocks | {"BLOCK_H": padded(latent_dim, 32) // 2}
    ordered = {name: arguments[name] for name in kernel.arg_names}
    return compile_for_sm90(kernel, ordered, tile.num_warps, tile.num_stages)


def usage_of(kernel: str, dtype: str, heads: int, latent_dim: int, rope_dim: int, widest: int = 64) -> Usage:
    make_tile = {"decode": latent.decode_tile, "prefix": latent.prefix_tile}[kernel]
    tile = make_tile(heads, latent_dim, 2 if dtype == "bf16" else 4, widest)
    usage = compiled(getattr(latent_kernels, f"latent_{kernel}_kernel"), heads, tile, dtype, latent_dim, rope_dim)
    show(f"latent {kernel} {dtype}, {heads} heads, {latent_dim} + {rope_dim}, {tile.lines} lines", usage)
    assert usage.uses_tensor_cores
    return usage


FAST = [("decode", 16, 512, 64), ("prefix", 128, 512, 64)]  # DeepSeek-V3 on 8 ranks, and on one
SIZES = [(heads, 512, 64) for heads in (8, 16, 17, 32, 40, 64, 128)] + [(20, 256, 32), (16, 320, 48)]
MORE = [(kernel, *sizes) for kernel in ("decode", "prefix") for sizes in SIZES if (kernel, *sizes) not in FAST]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]


@pytest.mark.parametrize(("kernel", "heads", "latent_dim", "rope_dim"), CASES)
def test_bfloat16(kernel: str, heads: int, latent_dim: int, rope_dim: int) -> None:
    usage = usage_of(kernel, "bf16", heads, latent_dim, rope_dim)
    assert usage.registers <= 255
    assert usage.stack == 0, "it spills"
    assert usage.shared <= SHARED_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("heads", [16, 32, 128])
@pytest.mark.parametrize("kernel", ["decode", "prefix"])
def test_gpus_with_less_shared_memory(kernel: str, heads: int) -> None:
    usage = usage_of(kernel, "bf16", heads, 512, 64, widest=32)
    assert usage.stack == 0, "it spills"
    assert usage.shared <= 99 * 1024


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "latent_dim"), [("fp32", 512), ("bf16", 1024)])
@pytest.mark.parametrize("kernel", ["decode", "prefix"])
def test_what_may_spill_fits_into_shared_memory(kernel: str, dtype: str, latent_dim: int) -> None:
    assert usage_of(kernel, dtype, 16, latent_dim, 64).shared <= 99 * 1024


def expanded_usage(dtype: str, plain_dim: int, rope_dim: int, widest: int, has_prefix: bool) -> Usage:
    tensors = dict.fromkeys(["q", "made", "ropes", "out"], f"*{dtype}") | {
        "qo_indptr": "*i32",
        "prefix_largest": "*fp32",
    }
    strides = ["q_token_stride", "q_head_stride", "made_stride", "rope_stride", "out_token_stride", "out_head_stride"]
    sizes = dict.fromkeys([*strides, "num_heads"], "i32:16") | {"num_rows": "i32", "scale": "fp32"}
    tile = latent.expanded_tile(plain_dim, plain_dim, 2 if dtype == "bf16" else 4, widest)
    widths = {"PLAIN_DIM": plain_dim, "ROPE_DIM": rope_dim, "VALUE_DIM": plain_dim, "HAS_PREFIX": has_prefix}
    blocks = {"BLOCK_M": tile.lines, "BLOCK_N": tile.keys, "BLOCK_P": padded(plain_dim, 16)}
    blocks |= {"BLOCK_R": padded(rope_dim, 16), "BLOCK_V": padded(plain_dim, 16)}
    kernel, arguments = latent_expanded.expanded_kernel, tensors | sizes | widths | blocks
    ordered = {name: arguments[name] for name in kernel.arg_names}
    usage = compile_for_sm90(kernel, ordered, tile.num_warps, tile.num_stages)
    show(f"expanded {dtype}, heads of {plain_dim} + {rope_dim}, {tile.lines} lines", usage)
    assert usage.stack == 0, "it spills"
    assert usage.uses_tensor_cores
    return usage


MORE_EXPANDED = [("bf16", 64, 32, 64, True), ("bf16", 128, 64, 64, False), ("bf16", 128, 64, 32, True)]
MORE_EXPANDED += [("bf16", 192, 64, 64, True), ("fp32", 128, 64, 64, True), ("fp32", 64, 32, 64, True)]


@pytest.mark.parametrize(
    ("dtype", "plain_dim", "rope_dim", "widest", "has_prefix"),
    [("bf16", 128, 64, 64, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_EXPANDED)],
)
def test_expanded(dtype: str, plain_dim: int, rope_dim: int, widest: int, has_prefix: bool) -> None:
    usage = expanded_usage(dtype, plain_dim, rope_dim, widest, has_prefix)
    assert usage.shared <= (SHARED_LIMIT if widest == 64 else 99 * 1024)


def test_merge_of_as_many_splits_as_there_may_be() -> None:
    tensors = dict.fromkeys(PARTIAL, "*fp32") | {"qo_indptr": "*i32", "out": "*bf16", "num_heads": "i32:16"}
    constants = {"ONLY_SINGLE": False, "NUM_SPLITS": latent._MOST_SPLITS, "HEAD_DIM": 512}
    usage = compile_for_sm90(decode.merge_kernel, tensors | constants | {"BLOCK_D": latent._MERGED_COLUMNS})
    show("merge of latents", usage)
    assert usage.stack == 0, "it spills"


def test_append_latent() -> None:
    arguments = {"latent": "*bf16", "cache": "*bf16", "slots": "*i64", "stride": "i32:16", "width": "i32:16"}
    usage = compile_for_sm90(paged_cache.append_latent_kernel, arguments | {"BLOCK": 1024})
    show("append_latent", usage)
    assert usage.stack == 0, "it spills"

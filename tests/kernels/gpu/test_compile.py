"""Each kernel compiles for sm_90 without a GPU and keeps its values in registers; -s prints what each needs.

python -m pytest tests/kernels/gpu/test_compile.py -s
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from max_ray.kernels.gpu import activation, attention, decode, experts, norm, paged_cache, prefill, rope, sampling
from max_ray.kernels.gpu.launch import padded
from tests.kernels.gpu.sm90 import Usage, compile_for_sm90


@pytest.fixture(autouse=True)
def _nothing_from_earlier_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check(name: str, usage: Usage) -> None:
    print(f"\n{name}: {usage.registers} registers, {usage.stack} bytes of stack, {usage.shared} bytes shared", end="")
    assert usage.registers <= 255
    assert usage.stack == 0, f"{name} spills"


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_rmsnorm(dtype: str) -> None:
    tensors = dict.fromkeys(["x", "residual", "weight", "out", "new_residual"], f"*{dtype}")
    sizes = {"x_stride": "i32:16", "residual_stride": "i32:16", "hidden": "i32:16", "eps": "fp32"}
    arguments = tensors | sizes | {"HAS_RESIDUAL": True, "BLOCK": 4096}
    check(f"rmsnorm {dtype}", compile_for_sm90(norm.rmsnorm_kernel, arguments, num_warps=16))


def test_silu_and_mul() -> None:
    arguments = {"x": "*bf16", "out": "*bf16", "x_stride": "i32:16", "width": "i32:16", "BLOCK": 2048}
    check("silu_and_mul", compile_for_sm90(activation.silu_and_mul_kernel, arguments, num_warps=8))


def test_sum_choices() -> None:
    tensors = {"y": "*bf16", "places": "*i64", "weights": "*fp32", "out": "*bf16"}
    arguments = tensors | {"y_stride": "i32:16", "width": "i32:16", "top_k": "i32", "BLOCK": 2048}
    check("sum_choices", compile_for_sm90(experts.sum_choices_kernel, arguments, num_warps=8))


def test_append() -> None:
    tensors = dict.fromkeys(["k", "v", "k_cache", "v_cache"], "*bf16") | {"slots": "*i64"}
    strides = [f"{x}_{axis}_stride" for x in "kv" for axis in ("token", "head")]
    arguments = tensors | dict.fromkeys([*strides, "width"], "i32:16") | {"HEAD_DIM": 128, "BLOCK": 1024}
    check("append", compile_for_sm90(paged_cache.append_kernel, arguments))


@pytest.mark.parametrize(
    ("head_dim", "has_cache"),
    [(128, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((128, False), (64, True), (80, True)))],
)
def test_rope(head_dim: int, has_cache: bool) -> None:
    tensors = dict.fromkeys(["q", "k", "v", "q_out", "k_out", "v_out"], "*bf16")
    indices = {"cos_sin": "*fp32", "positions": "*i64", "slots": "*i64"}
    strides = [f"{x}_{axis}_stride" for x in "qkv" for axis in ("token", "head")]
    sizes = dict.fromkeys([*strides, "cos_sin_stride"], "i32:16") | {"num_heads": "i32:16", "num_kv_heads": "i32"}
    block_dim = 128 if head_dim == 80 else head_dim
    constants: dict[str, Any] = {"HEAD_DIM": head_dim, "PAIRS": head_dim // 2, "INTERLEAVED": False}
    constants |= {"HAS_POSITIONS": False, "HAS_CACHE": has_cache, "BLOCK_HEADS": 1024 // block_dim}
    constants |= {"BLOCK_PAIRS": block_dim // 2, "BLOCK_TAIL": 0, "BLOCK_DIM": block_dim}
    usage = compile_for_sm90(rope.rope_kernel, tensors | indices | sizes | constants)
    check(f"rope head_dim={head_dim} cache={has_cache}", usage)


def attention_arguments(dtype: str, head_dim: int, tile: attention._Tile, extra: list[str]) -> dict[str, Any]:
    """A Llama of 4 query heads a key head, pages of 16."""
    tensors = dict.fromkeys(["q", "k_cache", "v_cache"], f"*{dtype}")
    indices = dict.fromkeys(["block_tables", "cache_lengths", "qo_indptr"], "*i32")
    strides = dict.fromkeys(["q_token_stride", "q_head_stride"], "i32:16") | {"table_stride": "i32"}
    sizes = strides | {"token_stride": "i32:16", "num_heads": "i32:16"}
    constants = {"GROUP": 4, "WINDOW": 0, "SOFTCAP": 0.0, "PAGE_SIZE": 16, "HEAD_DIM": head_dim, "BLOCK_M": tile.lines}
    constants |= {"BLOCK_N": tile.keys, "BLOCK_D": padded(head_dim), "HAS_SINKS": False}
    out = {"out": f"*{dtype}", "sinks": f"*{dtype}"} | dict.fromkeys(extra, "*fp32")
    return tensors | indices | out | sizes | constants


def in_order(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in kernel.arg_names}


MORE = [("bf16", 64), ("bf16", 80), ("bf16", 256), ("fp32", 64), ("fp32", 128)]
PREFILL = [*((*case, 0, 0.0) for case in MORE), ("bf16", 128, 4096, 0.0), ("bf16", 256, 4096, 72.1)]
SHARED_LIMIT = 227 * 1024  # bytes a block, compute capability 9.0


@pytest.mark.parametrize(
    ("dtype", "head_dim", "softcap"),
    [("bf16", 128, 0.0), ("bf16", 256, 72.1), *(pytest.param(*case, 0.0, marks=pytest.mark.slow) for case in MORE)],
)
def test_decode(dtype: str, head_dim: int, softcap: float) -> None:
    tile = attention.decode_tile(4, head_dim, 2 if dtype == "bf16" else 4)
    arguments = attention_arguments(dtype, head_dim, tile, ["partial_acc", "partial_largest", "partial_total"])
    arguments |= {"ONLY_SINGLE": False, "NUM_SPLITS": 8, "scale": "fp32", "SOFTCAP": softcap}
    ordered = in_order(decode.decode_kernel, arguments)
    usage = compile_for_sm90(decode.decode_kernel, ordered, tile.num_warps, tile.num_stages)
    check(f"decode {dtype} head_dim={head_dim} softcap={softcap}", usage)
    assert usage.shared <= SHARED_LIMIT
    assert usage.uses_tensor_cores


@pytest.mark.parametrize("window", [0, pytest.param(128, marks=pytest.mark.slow)])
def test_decode_and_prefill_with_sinks(window: int) -> None:
    """gpt-oss: heads of 64 numbers, 8 query heads a key head."""
    extra = ["partial_acc", "partial_largest", "partial_total"]
    for kernel, tile in ((decode.decode_kernel, attention.decode_tile(8, 64, 2)),
                         (prefill.prefill_kernel, attention.prefill_tile(8, 64, 2))):  # fmt: skip
        arguments = attention_arguments("bf16", 64, tile, extra)
        arguments |= {"GROUP": 8, "WINDOW": window, "HAS_SINKS": True, "scale": "fp32", "num_rows": "i32"}
        arguments |= {"ONLY_SINGLE": True, "NUM_SPLITS": 8, "SKIP_SINGLE": True, "BLOCK_Q": tile.lines // 8}
        usage = compile_for_sm90(kernel, in_order(kernel, arguments), tile.num_warps, tile.num_stages)
        check(f"{kernel.__name__} with sinks, window {window}", usage)
        assert usage.shared <= SHARED_LIMIT


@pytest.mark.parametrize("head_dim", [128, pytest.param(256, marks=pytest.mark.slow)])
def test_merge(head_dim: int) -> None:
    tensors = dict.fromkeys(["partial_acc", "partial_largest", "partial_total"], "*fp32") | {"qo_indptr": "*i32"}
    constants = {"ONLY_SINGLE": False, "NUM_SPLITS": 32, "HEAD_DIM": head_dim, "BLOCK_D": head_dim}
    arguments = tensors | {"out": "*bf16", "num_heads": "i32:16"} | constants
    check(f"merge head_dim={head_dim}", compile_for_sm90(decode.merge_kernel, arguments))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "window", "softcap"),
    [("bf16", 128, 0, 0.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in PREFILL)],
)
def test_prefill(dtype: str, head_dim: int, window: int, softcap: float) -> None:
    tile = attention.prefill_tile(4, head_dim, 2 if dtype == "bf16" else 4)
    arguments = attention_arguments(dtype, head_dim, tile, [])
    arguments |= {"num_rows": "i32", "scale": "fp32", "SKIP_SINGLE": True, "BLOCK_Q": tile.lines // 4}
    arguments |= {"WINDOW": window, "SOFTCAP": softcap}
    ordered = in_order(prefill.prefill_kernel, arguments)
    usage = compile_for_sm90(prefill.prefill_kernel, ordered, tile.num_warps, tile.num_stages)
    check(f"prefill {dtype} head_dim={head_dim} window={window} softcap={softcap}", usage)
    assert usage.shared <= SHARED_LIMIT
    assert usage.uses_tensor_cores


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_sampling(dtype: str) -> None:
    columns = {"temperatures": "*fp32", "top_ks": "*i64", "top_ps": "*fp64", "min_ps": "*fp32"}
    state = {"seeds": "*i64", "counters": "*i64", "tokens": "*i64"}
    sizes = {"logits_stride": "i32:16", "vocab_size": "i32:16", "BLOCK": 4096}
    arguments = {"logits": f"*{dtype}"} | columns | state | sizes
    options = {"num_warps": 16, "maxnreg": sampling._MOST_REGISTERS}
    check(f"sampling {dtype}", compile_for_sm90(sampling.sample_kernel, arguments, **options))

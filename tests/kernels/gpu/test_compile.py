"""Each kernel compiles for sm_90 without a GPU and keeps its values in registers; -s prints what each needs.

python -m pytest tests/kernels/gpu/test_compile.py -s
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from max_ray.kernels.gpu import activation, norm, paged_cache, rope
from tests.kernels.gpu.sm90 import Usage, compile_for_sm90


@pytest.fixture(autouse=True)
def _nothing_from_earlier_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check(name: str, usage: Usage) -> None:
    print(f"\n{name}: {usage.registers} registers, {usage.stack} bytes of stack, {usage.shared} bytes shared", end="")
    assert usage.registers <= 255
    assert usage.stack == 0, f"{name} spills"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_rmsnorm(dtype: str) -> None:
    tensors = dict.fromkeys(["x", "residual", "weight", "out", "new_residual"], f"*{dtype}")
    sizes = {"x_stride": "i32:16", "residual_stride": "i32:16", "hidden": "i32:16", "eps": "fp32"}
    arguments = tensors | sizes | {"HAS_RESIDUAL": True, "BLOCK": 4096}
    check(f"rmsnorm {dtype}", compile_for_sm90(norm.rmsnorm_kernel, arguments, num_warps=16))


def test_silu_and_mul() -> None:
    arguments = {"x": "*bf16", "out": "*bf16", "x_stride": "i32:16", "width": "i32:16", "BLOCK": 2048}
    check("silu_and_mul", compile_for_sm90(activation.silu_and_mul_kernel, arguments, num_warps=8))


def test_append() -> None:
    tensors = dict.fromkeys(["k", "v", "k_cache", "v_cache"], "*bf16") | {"slots": "*i64"}
    strides = [f"{x}_{axis}_stride" for x in "kv" for axis in ("token", "head")]
    arguments = tensors | dict.fromkeys([*strides, "width"], "i32:16") | {"HEAD_DIM": 128, "BLOCK": 1024}
    check("append", compile_for_sm90(paged_cache.append_kernel, arguments))


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("has_cache", [False, True])
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

"""Products with quantized weights compile for sm_90, keep their values in registers and use tensor cores.

python -m pytest tests/kernels/gpu/test_compile_quantized.py -s -m "slow or not slow"
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from max_ray.kernels.gpu import few_rows, many_rows, packed, quantized, tiles
from tests.kernels.gpu.sm90 import Usage, compile_for_sm90

SHARED_LIMIT = 227 * 1024  # bytes a block, compute capability 9.0
PROCESSORS = 132
KINDS: dict[str, tuple[int, str, int, bool]] = {
    "q4_k": (packed.Q4K.value, "*u8", 32, False),
    "q5_k": (packed.Q5K.value, "*u8", 32, False),
    "q6_k": (packed.Q6K.value, "*i8", 16, False),
    "q8_0": (packed.Q8.value, "*fp16", 32, False),
    "q4_0": (packed.Q4.value, "*fp16", 32, True),
    "q4_1": (packed.Q4_1.value, "*fp16", 32, False),
    "gptq": (packed.Q4.value, "*fp16", 128, False),
    "fp8": (packed.FP8.value, "*fp32", 128, False),
}
"""KIND, type of the scales, SIZE, SINGLE_ZERO."""


@pytest.fixture(autouse=True)
def _nothing_from_earlier_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def arguments(kind: str, dtype: str, out: str, more: dict[str, Any]) -> dict[str, Any]:
    number, scales, size, single_zero = KINDS[kind]
    pointers = {"x": f"*{dtype}", "codes": "*i32", "high_codes": "*i32", "scales": scales, "mins": "*u8"}
    pointers |= {"mins": "*fp16"} if kind == "q4_1" else {}
    pointers |= dict.fromkeys(["super_scales", "super_mins"], "*fp16") | {"ends": "*i32"}
    sizes = dict.fromkeys(["num_rows", "num_columns", "num_groups", "num_scales", "x_stride", "out_stride"], "i32:16")
    sizes |= dict.fromkeys(["num_tokens", "expert_tiles", "num_experts", "first_row"], "i32")
    constants = {"KIND": number, "SIZE": size, "SINGLE_ZERO": single_zero}
    return pointers | {"out": f"*{out}"} | sizes | constants | more


def compiled(kernel: Any, kind: str, dtype: str, out: str, more: dict[str, Any], warps: int, stages: int) -> Usage:
    known = arguments(kind, dtype, out, more)
    return compile_for_sm90(kernel, {name: known[name] for name in kernel.arg_names}, warps, stages)


def check(name: str, usage: Usage) -> None:
    print(f"\n{name}: {usage.registers} registers, {usage.stack} bytes of stack, {usage.shared} bytes shared", end="")
    assert usage.stack == 0, f"{name} spills"
    assert usage.shared <= SHARED_LIMIT


OFTEN = [("q4_k", 1), ("q5_k", 8), ("q6_k", 64)]
CASES = [
    pytest.param(kind, tokens, marks=() if (kind, tokens) in OFTEN else pytest.mark.slow)
    for kind in KINDS
    for tokens in (1, 8, 16, 32, 64, 128)
]


@pytest.mark.parametrize(("kind", "tokens"), CASES)
def test_products(kind: str, tokens: int) -> None:
    """Of an 8B model's narrow layer: whole at one row of inputs, in splits at more."""
    tile = quantized.choose_tile(tokens, 4096, 2, PROCESSORS)
    splits = quantized.num_splits(4096 // tile.rows, 128 // tile.groups, PROCESSORS)
    kernel = few_rows.few_rows_kernel if tile.is_few else many_rows.many_rows_kernel
    blocks = {"GROUPS": tile.groups, "BLOCK_N": tile.rows, "BLOCK_T": tile.tokens}
    more = blocks | {"BLOCK_E": 0}
    out = "bf16" if splits == 1 else "fp32"
    usage = compiled(kernel, kind, "bf16", out, more, tile.num_warps, tile.num_stages)
    check(f"{kind}, {tokens} rows in {splits} splits", usage)
    assert usage.uses_tensor_cores


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("tokens", [1, 4, 16, 64])
def test_other_dtypes_and_wide_layers(tokens: int, dtype: str, kind: str) -> None:
    if dtype == "fp32" and tokens > quantized.FEW_ROWS:
        pytest.skip("float32 is unpacked for more rows")
    tile = quantized.choose_tile(tokens, 28672, 4 if dtype == "fp32" else 2, PROCESSORS)
    kernel = few_rows.few_rows_kernel if tile.is_few else many_rows.many_rows_kernel
    blocks = {"GROUPS": tile.groups, "BLOCK_N": tile.rows, "BLOCK_T": tile.tokens}
    more = blocks | {"BLOCK_E": 128}
    usage = compiled(kernel, kind, dtype, dtype, more, tile.num_warps, tile.num_stages)
    check(f"{kind}, {tokens} rows, {dtype}", usage)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(kind, dtype, marks=() if (kind, dtype) == ("fp8", "bf16") else pytest.mark.slow)
        for kind in KINDS
        for dtype in ("bf16", "fp32")
    ],
)
def test_unpack(kind: str, dtype: str) -> None:
    more = {"GROUPS": quantized.UNPACK_GROUPS, "BLOCK_N": quantized.UNPACK_ROWS}
    check(f"unpack {kind} to {dtype}", compiled(many_rows.unpack_kernel, kind, dtype, dtype, more, 4, 3))


def test_merge() -> None:
    pointers = {"partial": "*fp32", "out": "*bf16"}
    sizes = {"num_tokens": "i32", "num_splits": "i32", "num_rows": "i32:16", "out_stride": "i32:16"}
    check("merge", compile_for_sm90(tiles.merge_kernel, pointers | sizes | {"BLOCK": 1024}))

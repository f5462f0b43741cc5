"""Triton products with quantized weights against the reference implementation: every kind, at borders, in both regimes.

TRITON_INTERPRET=1 python -m pytest tests/kernels/gpu/interpreted_quantized.py
"""

from __future__ import annotations

import pytest
import torch

from max_ray.kernels import gpu, reference
from max_ray.kernels.gpu import quantized
from max_ray.kernels.quantized import PackedFP8, PackedMatrix, of_stack, stack
from tests.kernels.packed_matrices import COLUMNS, KINDS, fp8, q4_0, q4_k, q8_0

HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def check(x: torch.Tensor, matrix: PackedMatrix, out: torch.Tensor | None = None) -> None:
    """Against the reference implementation in float64. What may differ: sums of float32, the result's rounding, and
    with more than 16 rows of 16-bit inputs the rounding of each weight, whose errors add up as random ones do."""
    assert quantized.operands_of(matrix) is not None, "the reference implementation would be held against itself"
    weight = matrix.dequantize(slice(0, matrix.num_tiles))[: matrix.rows].double()
    expected = x.double() @ weight.t()
    actual = gpu.quantized_linear(x, matrix, out)
    assert actual.dtype == x.dtype
    assert actual.shape == expected.shape
    bound = 1.01 * HALF_UNIT[x.dtype] * expected.abs() + 1e-6 * (x.double().abs() @ weight.abs().t()) + 1e-7
    if x.numel() > quantized.FEW_ROWS * matrix.columns and x.dtype != torch.float32:
        bound += 3 * HALF_UNIT[x.dtype] * ((x.double() ** 2) @ (weight**2).t()).sqrt()
    wrong = (actual.double() - expected).abs() - bound
    assert (wrong <= 0).all(), f"{int((wrong > 0).sum())} of {wrong.numel()} numbers are off, by up to {wrong.max()}"


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_kinds(kind: str, tokens: int) -> None:
    """Neither whole tiles nor whole blocks, and a round that is cut."""
    columns = 288 // COLUMNS.get(kind, 32) * COLUMNS.get(kind, 32)
    check(inputs(tokens, columns), KINDS[kind](75, columns))


OFTEN = ("q4_k", "q5_k", "q6_k", "q8_0", "fp8 of 16")


@pytest.mark.parametrize(
    "kind", [kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    columns = max(256, COLUMNS.get(kind, 32))
    for tokens in (2, 17):
        check(inputs(tokens, columns, dtype=dtype), KINDS[kind](20, columns))


@pytest.mark.parametrize("tokens", [0, 1, 2, 8, 9, 15, 16, 17, 33, 65, 130])
def test_rows_of_inputs_at_the_borders_of_tiles(tokens: int) -> None:
    check(inputs(tokens, 96), q8_0(70, 96))


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 64, 65, 260])
def test_rows_of_the_matrix_at_the_borders_of_blocks(rows: int) -> None:
    for tokens in (1, 5, 18):
        check(inputs(tokens, 64), q4_0(rows, 64))


@pytest.mark.parametrize("columns", [32, 64, 160, 2048])
def test_columns_at_the_borders_of_rounds_and_splits(columns: int) -> None:
    for tokens in (1, 5, 18):
        check(inputs(tokens, columns), q8_0(33, columns))


@pytest.mark.parametrize("columns", [16, 48, 272])
def test_fp8_with_half_a_group(columns: int) -> None:
    for size in (None, 16):
        for tokens in (1, 18):
            check(inputs(tokens, columns), fp8(size)(20, columns))


@pytest.mark.parametrize("tokens", [2, 5, 20])
@pytest.mark.parametrize("splits", [2, 5])
def test_splits(splits: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also more than there are rounds: a split may be empty."""
    monkeypatch.setattr(quantized, "num_splits", lambda *_: splits)
    matrix, x = q4_k(40, 768), inputs(tokens, 768)
    check(x, matrix)
    assert torch.equal(gpu.quantized_linear(x, matrix), gpu.quantized_linear(x, matrix))


@pytest.mark.parametrize("kind", ["q4_k", "q5_k", "q6_k", "fp8 of rows", "fp8 of 16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unpacked_in_pieces(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = 256 if kind.startswith("q") else 272
    monkeypatch.setattr(quantized, "LIBRARY_ROWS", 20)
    monkeypatch.setattr(quantized, "_UNPACKED_ELEMENTS", 48 * columns)
    wide = torch.full((20, 110), -7.0, dtype=dtype)
    check(inputs(20, columns, dtype=dtype), KINDS[kind](103, columns), wide[:, 3:106])
    assert (wide[:, :3] == -7).all()
    assert (wide[:, 106:] == -7).all()


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_columns_of_a_wider_matrix_and_rows_of_a_wider_input(tokens: int) -> None:
    matrix, x = q8_0(21, 96), inputs(tokens, 200)[:, 5:101]
    wide = torch.full((tokens, 40), -7.0, dtype=x.dtype)
    check(x, matrix, wide[:, 7:28])
    assert torch.equal(wide[:, 7:28], gpu.quantized_linear(x, matrix))
    assert (wide[:, :7] == -7).all()
    assert (wide[:, 28:] == -7).all()
    check(inputs(2, tokens, 96), matrix)
    check(inputs(96, tokens).t(), matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [16, 17])
def test_every_e4m3_code(tokens: int, dtype: torch.dtype) -> None:
    """Subnormal ones, too; what is no number makes its row's outputs none."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(16, 1)
    codes[:8][(codes[:8] & 0x7F) == 0x7F] = 0
    matrix = PackedFP8(16, 256, codes[None].view(torch.float8_e4m3fn), torch.ones(1, 1, 16))
    got = torch.cat([gpu.quantized_linear(rows, matrix) for rows in torch.eye(256, dtype=dtype).split(tokens)])
    assert torch.equal(got[:, :8], matrix.dequantize(slice(0, 1))[:8].t().to(dtype))
    assert got[:, 8:].isnan().all()


@pytest.mark.parametrize("kind", ["q4_k", "q4 of 128", "q5_k", "q6_k"])
def test_one_large_input_does_not_drown_the_others(kind: str) -> None:
    """Codes less their offsets are summed, not codes of one sign whose sums cancel."""
    x = inputs(4, 256)
    x[:, 7] = 3000
    check(x, KINDS[kind](32, 256))


COUNTS = [[3, 0, 1, 0, 2], [0, 0, 0, 0, 1], [40, 0, 17, 3, 33], [0, 9, 8, 0, 0], [0, 0, 0, 0, 0], [70, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        *(("q4_k", counts) for counts in COUNTS),
        *((kind, counts) for kind in ("q4_0", "q5_k") for counts in COUNTS[::2]),
        *(
            pytest.param(kind, counts, marks=pytest.mark.slow)
            for kind in ("q6_k", "q8_0", "fp8 of 128")
            for counts in COUNTS
        ),
    ],
    ids=str,
)
def test_groups_of_rows_with_a_matrix_each(kind: str, counts: list[int]) -> None:
    """Groups that are empty, or several tiles; rows after the last group, which are anybody's."""
    stacked = stack([KINDS[kind](40, 256) for _ in counts])
    assert stacked is not None
    x, ends = inputs(sum(counts) + 3, 256), torch.tensor(counts).cumsum(0).to(torch.int32)
    wide = torch.full((len(x), 44), -7.0, dtype=x.dtype)
    gpu.grouped_quantized_linear(x, stacked, ends, wide[:, 2:42])
    assert (wide[:, :2] == -7).all()
    assert (wide[:, 42:] == -7).all()
    start = 0
    for index, end in enumerate(ends.tolist()):
        expected = reference.quantized_linear(x[start:end], of_stack(stacked, index))
        torch.testing.assert_close(wide[start:end, 2:42], expected, atol=0.05, rtol=0.02)
        start = end


def test_groups_in_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "num_splits", lambda *_: 3)
    test_groups_of_rows_with_a_matrix_each("q4_k", [3, 0, 1, 0, 2])
    test_groups_of_rows_with_a_matrix_each("q8_0", [40, 0, 17, 3, 33])


def test_what_no_kernel_reads_runs_the_reference() -> None:
    matrix = fp8(8)(20, 24)
    assert quantized.operands_of(matrix) is None
    x = inputs(3, 24)
    assert torch.equal(gpu.quantized_linear(x, matrix), reference.quantized_linear(x, matrix))


def test_tiles_fill_the_gpu() -> None:
    """Of an 8B model on 132 processors."""
    narrow, wide = quantized.choose_tile(1, 4096, 2, 132), quantized.choose_tile(1, 28672, 2, 132)
    assert (narrow.rows, wide.rows) == (16, 64)
    assert quantized.num_splits(4096 // 16, 8, 132) == 1
    assert quantized.num_splits(4096 // 64, 32, 132) == 4
    assert quantized.num_splits(4096 // 64, 8, 132) == 2
    assert quantized.num_splits(1, 2, 132) == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_random_sizes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def number(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    kind = list(KINDS)[seed % len(KINDS)]
    multiple = COLUMNS.get(kind, 32)
    columns = (1 + number(1024 // multiple)) * multiple
    dtype = [torch.float32, torch.bfloat16, torch.float16][number(3)]
    tokens = number(20) if number(2) else number(150)
    check(inputs(tokens, columns, dtype=dtype), KINDS[kind](1 + number(200), columns))

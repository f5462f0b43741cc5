"""Packed matrices: unpacking gives back every weight; products and rows equal those of the dequantized matrix."""

from __future__ import annotations

import pytest
import torch

from max_ray import kernels
from max_ray.kernels import has_native, native
from max_ray.kernels.native.calls import kernel
from max_ray.kernels.native.quantized import described, rounds_inputs
from max_ray.kernels.quantized import PackedMatrix, PackedQ4, tile_nibbles, tile_scales
from max_ray.nn.quantized_linear import PackedSegment, pack
from max_ray.weights import DictWeightSource
from max_ray.weights.parameter import PartSpec, StoredPart
from max_ray.weights.quantize import QuantizingSource, quantize
from max_ray.weights.quantized import QuantizedRows
from tests.kernels.naive import naive_rounded_to_bytes

ENCODINGS = ["q4_k", "q4_0", "q4_1", "q5_k", "q6_k", "q8_0"]
BITS = {"q4_k": 4.625, "q4_0": 4.5, "q4_1": 5.0, "q5_k": 5.625, "q6_k": 6.5625, "q8_0": 8.5}
CPU = torch.device("cpu")


def packed(
    encoding: str, values: torch.Tensor, rows: range, columns: range, padding: int = 0
) -> tuple[PackedMatrix, torch.Tensor]:
    """A part packed, and what it must be: its dequantized rows, then zeros."""
    source = QuantizingSource(DictWeightSource({"w": values}), encoding)
    part = StoredPart(source, "w", rows, columns, encoding)
    cut = values[rows.start : rows.stop, columns.start : columns.stop]
    expected = quantize(encoding, cut).dequantize() if len(rows) else cut
    return pack([part], padding, CPU)[0], torch.cat([expected, torch.zeros(padding, len(columns))])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("rows", "padding"), [(range(32), 0), (range(3, 40), 0), (range(5), 14), (range(7, 7), 20)])
def test_packing_keeps_every_weight(encoding: str, rows: range, padding: int) -> None:
    values = torch.randn(48, 768, generator=torch.Generator().manual_seed(0))
    matrix, expected = packed(encoding, values, rows, range(256, 768), padding)
    got = matrix.dequantize(slice(0, matrix.num_tiles))
    torch.testing.assert_close(got[: matrix.rows], expected, atol=1e-6, rtol=1e-6)
    assert not got[matrix.rows :].any()
    indices = torch.tensor([len(expected) - 1, 0, 2, 0])
    torch.testing.assert_close(matrix.gather(indices), expected[indices], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_products_equal_those_of_the_dequantized_matrix(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("max_ray.kernels.reference.quantized._CHUNK_ELEMENTS", 16 * 256)  # several chunks
    values = torch.randn(70, 256, generator=torch.Generator().manual_seed(1))
    matrix, expected = packed(encoding, values, range(70), range(256))
    for shape in ((1, 256), (3, 256), (2, 3, 256), (0, 256)):
        x = torch.randn(shape)
        torch.testing.assert_close(kernels.quantized_linear(x, matrix), x @ expected.t(), atol=1e-4, rtol=1e-5)
    half = torch.randn(2, 256).bfloat16()
    inputs = naive_rounded_to_bytes(half) if has_native() and rounds_inputs() else half.float()
    exact = (inputs @ expected.t()).bfloat16()
    torch.testing.assert_close(kernels.quantized_linear(half, matrix), exact, atol=2e-3, rtol=8e-3)
    rows = kernels.quantized_rows(matrix, torch.tensor([[1, 69], [0, 5]]), torch.bfloat16)
    assert torch.equal(rows, expected[torch.tensor([[1, 69], [0, 5]])].bfloat16())


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize(
    ("encoding", "columns"), [("q4_k", 768), ("q4_0", 352), ("q4_1", 352), ("q5_k", 768), ("q6_k", 512), ("q8_0", 96)]
)
def test_the_compiled_kernel_gives_a_row_the_same_bits_in_every_batch(encoding: str, columns: int) -> None:
    values = torch.randn(70, columns, generator=torch.Generator().manual_seed(3)) / columns**0.5
    matrix, expected = packed(encoding, values, range(70), range(columns))
    x = torch.randn(60, columns)
    alone = torch.cat([native.quantized_linear(row[None], matrix) for row in x])
    torch.testing.assert_close(alone, x @ expected.t(), atol=1e-5, rtol=1e-5)
    for rows in (2, 16, 28, 29, 56, 57, 60):
        assert torch.equal(native.quantized_linear(x[:rows], matrix), alone[:rows])


COMPILED = pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")


def wide(encoding: str, seed: int) -> tuple[PackedMatrix, torch.Tensor]:
    """A matrix of 70 rows in each encoding, and it dequantized; "gptq": groups of 64 with zeros."""
    generator = torch.Generator().manual_seed(seed)
    if encoding != "gptq":
        return packed(encoding, torch.randn(70, 512, generator=generator), range(70), range(512))
    codes = torch.randint(0, 16, (80, 512), dtype=torch.uint8, generator=generator)
    scales, zeros = torch.rand(80, 8, generator=generator).half(), codes[:, :8].contiguous()
    matrix = PackedQ4(70, 512, tile_nibbles(codes), tile_scales(scales), tile_scales(zeros))
    return matrix, matrix.dequantize(slice(0, 5))[:70]


@COMPILED
@pytest.mark.parametrize("encoding", [*ENCODINGS, "gptq"])
def test_products_of_bytes_are_those_of_the_rounded_inputs(encoding: str) -> None:
    matrix, weight = wide(encoding, seed=4)
    x = torch.randn(35, 512) * torch.logspace(-3, 3, 512)
    x[3], x[4, 32:64] = 0, 0
    x[5, 7] = 1e30
    got = int8_linear(x, matrix)
    rounded = naive_rounded_to_bytes(x)
    assert not torch.equal(rounded, x)
    expected = (rounded.double() @ weight.double().t()).float()
    size = rounded.abs().double() @ (weight.abs() + weight.abs().max()).double().t()  # codes and offsets cancel
    assert ((got - expected).abs() <= 3e-6 * size).all()
    alone = torch.cat([int8_linear(row[None], matrix) for row in x])
    for rows in (1, 2, 15, 16, 17, 32, 33, 35):
        assert torch.equal(int8_linear(x[:rows], matrix), alone[:rows])
    x[9, 100], x[10, 5] = float("nan"), float("inf")
    unclean = int8_linear(x, matrix)
    assert unclean[9].isnan().all()
    assert not unclean[10].isfinite().any()
    assert torch.equal(unclean[11:], alone[11:])


@COMPILED
def test_threads_and_dtype_change_no_bit() -> None:
    matrix, _ = wide("q4_k", seed=5)
    x = torch.randn(40, 512).bfloat16()
    first = int8_linear(x.float(), matrix).bfloat16()
    assert torch.equal(int8_linear(x, matrix), first)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(int8_linear(x, matrix), first)
    finally:
        torch.set_num_threads(threads)


def int8_linear(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """The kernel of bytes, whatever the processor and the dtype."""
    known = described(matrix)
    assert known is not None
    run = kernel(f"{known[0]}_int8", x.dtype)
    assert run is not None
    y = torch.full((len(x), matrix.rows + 3), -7.0, dtype=x.dtype)
    run(known[1], x.data_ptr(), len(x), x.shape[1], matrix.rows, y.data_ptr(), y.stride(0), torch.get_num_threads())
    assert (y[:, matrix.rows :] == -7).all(), "written past the row's end"
    return y[:, : matrix.rows]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_memory_is_that_of_the_codes_and_scales(encoding: str) -> None:
    matrix, _ = packed(encoding, torch.randn(64, 512), range(64), range(512))
    nbytes = sum(parameter.data.nbytes for _, parameter in PackedSegment(matrix).parameters)
    assert nbytes == pytest.approx(64 * 512 * BITS[encoding] / 8, abs=1)


def test_wider_groups_with_a_zero_each() -> None:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (32, 256), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 16, (32, 2), dtype=torch.uint8, generator=generator)
    scales = torch.rand(32, 2, generator=generator).half()
    rows = QuantizedRows("q4", 128, codes, scales, zeros=zeros)

    class Source(DictWeightSource):
        def get_quantized(self, name: str, rows_wanted: range, columns: range) -> QuantizedRows:
            return rows

    part = StoredPart(Source({"w": codes}), "w", range(32), range(256), "gptq")
    matrix, order = pack([part], 0, CPU)
    assert order is None
    assert isinstance(matrix, PackedQ4)
    torch.testing.assert_close(matrix.dequantize(slice(0, 2)), rows.dequantize(), atol=1e-5, rtol=1e-5)
    x = torch.randn(3, 256, generator=generator)
    torch.testing.assert_close(kernels.quantized_linear(x, matrix), x @ rows.dequantize().t(), atol=1e-3, rtol=1e-5)


def test_parts_know_their_rectangle() -> None:
    source = DictWeightSource({"w": torch.arange(24.0).reshape(4, 6)})
    rows = StoredPart.of(PartSpec((4, 6), 0, 1, 3, 0), source, "w")
    columns = StoredPart.of(PartSpec((4, 6), 1, 2, 6, 0), source, "w")
    assert torch.equal(rows.read(), source.get("w")[1:3])
    assert torch.equal(columns.read(), source.get("w")[:, 2:])

"""Parts of a fused quantized weight: which of them share a matrix, and that it changes no bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from max_ray.errors import WeightsError
from max_ray.nn import quantized_linear
from max_ray.nn.quantized_linear import QuantizedWeight, build_weight
from max_ray.weights import open_weights
from max_ray.weights.parameter import StoredPart
from max_ray.weights.quantized import QuantizedRows
from max_ray.weights.source import DictWeightSource
from tests.gguf_files import write

CPU = torch.device("cpu")
COLUMNS = 256

CASES = {
    "all alike": ([("Q4_K", 32), ("Q4_K", 16), ("Q4_K", 24)], [72]),
    "another type in the middle": ([("Q4_K", 32), ("Q6_K", 16), ("Q4_K", 16)], [32, 16, 16]),
    "alike with high bits": ([("Q5_K", 32), ("Q5_K", 16), ("Q5_K", 24)], [72]),
    "a type that differs by high bits": ([("Q4_K", 32), ("Q5_K", 16), ("Q5_K", 16)], [32, 32]),
    "another type at the end": ([("Q4_K", 32), ("Q4_K", 16), ("Q6_K", 16)], [48, 16]),
    "a tile would be shared": ([("Q8_0", 24), ("Q8_0", 16), ("Q8_0", 16)], [24, 32]),
    "a plain one first": ([("F32", 16), ("Q4_0", 16), ("Q4_0", 16)], [16, 32]),
    "plain ones": ([("F32", 16), ("F32", 16)], [16, 16]),
}


def stored(path: Path, parts: Sequence[tuple[str, int]]) -> list[StoredPart]:
    generator = torch.Generator().manual_seed(3)
    tensors = {str(i): (kind, torch.randn(n, COLUMNS, generator=generator)) for i, (kind, n) in enumerate(parts)}
    source = open_weights(write(path, tensors), keep_quantized=True)
    return [
        StoredPart(source, str(i), range(rows), range(COLUMNS), source.quantization(str(i)))
        for i, (_, rows) in enumerate(parts)
    ]


def apart(parts: Sequence[StoredPart], padding: int, dtype: torch.dtype) -> QuantizedWeight:
    """The definition: a segment for each part."""
    weights = [
        build_weight([part], len(part.rows) + (padding if part is parts[-1] else 0), dtype, CPU) for part in parts
    ]
    return QuantizedWeight([segment for weight in weights for segment in weight.segments], dtype)


@pytest.mark.parametrize("padding", [0, 16, 40])
@pytest.mark.parametrize("name", CASES)
def test_neighbours_of_one_kind_share_a_matrix(tmp_path: Path, name: str, padding: int) -> None:
    kinds, expected = CASES[name]
    parts = stored(tmp_path / "w.gguf", kinds)
    rows = sum(len(part.rows) for part in parts) + padding
    x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(4))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = build_weight(parts, rows, dtype, CPU)
        assert [segment.num_rows for segment in weight.segments] == [*expected[:-1], expected[-1] + padding]
        y = weight.linear(x.to(dtype), None)
        assert torch.equal(y, apart(parts, padding, dtype).linear(x.to(dtype), None))
        assert not y[:, rows - padding :].any()


def test_a_ranks_rows_begin_anywhere(tmp_path: Path) -> None:
    first, second = stored(tmp_path / "w.gguf", [("Q4_K", 64), ("Q4_K", 64)])
    parts = [replace(first, rows=range(8, 40)), replace(second, rows=range(5, 25))]
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(5))
    weight = build_weight(parts, 52, torch.float32, CPU)
    assert [segment.num_rows for segment in weight.segments] == [52]
    assert torch.equal(weight.linear(x, None), apart(parts, 0, torch.float32).linear(x, None))


def test_a_scale_that_is_no_number_names_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "w.gguf"
    parts = stored(path, [("Q8_0", 16), ("Q8_0", 16), ("Q8_0", 16)])
    data = bytearray(path.read_bytes())
    at = parts[1].source._tensor("1").offset  # type: ignore[attr-defined]
    data[at : at + 2] = b"\x00\x7e"
    path.write_bytes(data)
    for packing in (quantized_linear.pack, quantized_linear.pack_codes):
        with pytest.raises(WeightsError, match=r"'1'.*no finite numbers"):
            packing(parts, 0, CPU)


class FourBits(DictWeightSource):
    """Rows of 4 bits in groups of 32, as GPTQ has them. order: of the columns; zero: one for all."""

    def __init__(self, order: torch.Tensor | None = None, zero: int | None = None, group_size: int = 32) -> None:
        super().__init__({"w": torch.empty(16, COLUMNS)})
        generator = torch.Generator().manual_seed(group_size)
        groups = COLUMNS // group_size
        self._rows = QuantizedRows(
            "q4",
            group_size,
            torch.randint(0, 16, (16, COLUMNS), dtype=torch.uint8, generator=generator),
            torch.rand(16, groups, generator=generator).half(),
            zeros=torch.randint(0, 16, (16, groups), dtype=torch.uint8, generator=generator)
            if zero is None
            else torch.tensor([zero], dtype=torch.uint8),
            order=order,
        )

    def get_quantized(self, name: str, rows: range, columns: range) -> QuantizedRows:
        taken = slice(rows.start, rows.stop)
        whole = self._rows
        zeros = whole.zeros
        assert zeros is not None
        return replace(
            whole,
            codes=whole.codes[taken],
            scales=whole.scales[taken],
            zeros=zeros if zeros.ndim == 1 else zeros[taken],
        )


@pytest.mark.parametrize(
    ("first", "second", "segments"),
    [
        (FourBits(), FourBits(), 1),
        (FourBits(zero=8), FourBits(zero=8), 1),
        (FourBits(zero=8), FourBits(zero=7), 2),
        (FourBits(zero=8), FourBits(), 2),
        (FourBits(), FourBits(group_size=64), 2),
        (FourBits(), FourBits(order=torch.arange(COLUMNS).flip(0)), 2),
        (FourBits(order=torch.arange(COLUMNS)), FourBits(order=torch.arange(COLUMNS)), 2),
    ],
)
def test_groups_of_other_sizes_zeros_and_orders_stay_apart(first: FourBits, second: FourBits, segments: int) -> None:
    parts = [StoredPart(source, "w", range(16), range(COLUMNS), "gptq") for source in (first, second)]
    weight = build_weight(parts, 32, torch.float32, CPU)
    assert len(weight.segments) == segments
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(6))
    assert torch.equal(weight.linear(x, None), apart(parts, 0, torch.float32).linear(x, None))

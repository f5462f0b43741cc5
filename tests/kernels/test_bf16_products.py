"""The C++ products of bfloat16 that this processor has (matrix registers, pairs, widened floats), each against the
definition; and the same bits for a row in every batch, where sums cancel, overflow or become subnormal.

python -m pytest tests/kernels/test_bf16_products.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from max_ray.kernels import native
from max_ray.kernels.native.calls import kernel
from max_ray.kernels.native.packed import PackedWeight

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")


def _available() -> list[str]:
    loaded = native.library()
    if loaded is None:
        return []
    found = {"linear": True, "linear_dot": loaded.has_bf16_products(), "linear_tiles": loaded.has_bf16_tiles()}
    return [name for name, is_there in found.items() if is_there]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=_available())
def pack(request: pytest.FixtureRequest) -> Callable[[torch.Tensor], PackedWeight]:
    def packed_for_this_product(weight: torch.Tensor) -> PackedWeight:
        packed = native.pack_weight(weight)
        assert packed is not None
        multiply = kernel(request.param, torch.bfloat16)
        assert multiply is not None
        return dataclasses.replace(packed, _multiply=multiply)

    return packed_for_this_product


def _bits(values: torch.Tensor) -> torch.Tensor:
    """With one kind of NaN."""
    return torch.where(values.isnan(), torch.full_like(values, float("nan")), values).view(torch.int16)


def _same_alone(packed: PackedWeight, x: torch.Tensor) -> bool:
    """All rows at once, against one, two, three and sixteen at a time."""
    whole = _bits(packed.linear(x, None))
    return all(
        torch.equal(torch.cat([_bits(packed.linear(part, None)) for part in x.split(size)]), whole)
        for size in (1, 2, 3, 16)
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 100])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (16, 32), (17, 31), (48, 33), (64, 64), (65, 95), (130, 513)])
def test_equals_the_definition(
    pack: Callable[[torch.Tensor], PackedWeight], outputs: int, inputs: int, rows: int
) -> None:
    torch.manual_seed(rows)
    weight, x = torch.randn(outputs, inputs).bfloat16(), torch.randn(rows, inputs).bfloat16()
    bias = torch.randn(outputs).bfloat16()
    product = x.double() @ weight.double().T
    packed = pack(weight)
    result = packed.linear(x, None)
    assert torch.allclose(result.double(), product, rtol=2**-8, atol=1e-4)
    assert torch.equal(packed.linear(x, bias), result + bias)


@pytest.mark.parametrize("seed", range(200))
def test_a_row_has_the_same_bits_in_every_batch(pack: Callable[[torch.Tensor], PackedWeight], seed: int) -> None:
    """Half of the weights are the others' negatives, in another place: what is left of a sum is its rounding errors."""
    torch.manual_seed(seed)
    half, outputs, rows = (int(torch.randint(low, high, ())) for low, high in ((1, 300), (1, 140), (1, 40)))
    size = float(torch.randint(-38, 19, ()))
    weight = (torch.randn(outputs, half) * 10.0**size).bfloat16()
    x = (torch.randn(rows, half) * torch.randn(rows, half).mul(4).exp()).bfloat16()
    order = torch.randperm(2 * half)
    weight, x = (torch.cat(pair, 1)[:, order].contiguous() for pair in ((weight, -weight), (x, x)))
    assert _same_alone(pack(weight), x)


def test_infinite_and_missing_numbers_stay_in_their_rows(pack: Callable[[torch.Tensor], PackedWeight]) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(40, 70).bfloat16(), torch.randn(20, 70).bfloat16()
    weight[3, 69], weight[20, 0] = float("inf"), float("nan")
    x[4, 5], x[7, 69] = float("-inf"), 0
    packed = pack(weight)
    assert _same_alone(packed, x)
    result = packed.linear(x, None)
    assert result[7, 3].isnan(), "infinity times zero"
    assert result[:, 20].isnan().all()
    is_finite = result.isfinite()
    assert is_finite.sum() == 40 * 20 - 20 - 20 - 38, "row 4, columns 3 and 20"

"""The experts' layer against a loop over tokens: cut and spread over ranks, looped and grouped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from max_ray.distributed import TPGroup
from max_ray.nn import Experts, grouped_matmul, grouped_matmul_waits, keep_best_groups, softmax_top_k
from max_ray.weights import DictWeightSource
from max_ray.weights.load import load_weights
from max_ray.weights.mapping import NameMap
from max_ray.weights.quantize import QuantizingSource
from max_ray.weights.quantized import QuantizedRows
from tests.nn.ranks import run_ranks

NUM_EXPERTS, DIM, WIDTH, TOP_K = 6, 8, 24, 2
NAMES = NameMap(
    [
        ("{}.gate", "all.{}.gate_up.weight:gate"),
        ("{}.up", "all.{}.gate_up.weight:up"),
        ("{}.down", "all.{}.down.weight"),
    ]
)


def checkpoint() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (WIDTH, DIM), "up": (WIDTH, DIM), "down": (DIM, WIDTH)}
    return {
        f"{index}.{name}": torch.randn(shape, generator=generator) / 3
        for index in range(NUM_EXPERTS)
        for name, shape in shapes.items()
    }


def build(tp: TPGroup, **options: bool) -> Experts:
    experts = Experts(NUM_EXPERTS, DIM, WIDTH, tp, **options)
    load_weights(experts.sharded_parameters(), DictWeightSource(checkpoint()), NAMES)
    return experts


def naive(x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """One token and one of its experts at a time."""
    tensors = checkpoint()
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, index in zip(weights[token], experts[token].tolist(), strict=True):
            hidden = F.silu(tensors[f"{index}.gate"] @ x[token]) * (tensors[f"{index}.up"] @ x[token])
            out[token] += weight * (tensors[f"{index}.down"] @ hidden)
    return out


def choices(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, weights, experts); expert 4 is chosen by no token."""
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(num_tokens, NUM_EXPERTS, generator=generator)
    logits[:, 4] = -100.0
    return torch.randn(num_tokens, DIM, generator=generator), *softmax_top_k(logits, TOP_K, renormalize=True)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_experts_equal_a_loop_over_tokens(size: int, spread: bool, grouped: bool) -> None:
    for num_tokens in (1, 5, 40):
        batch = choices(num_tokens)
        for result in run_ranks(size, lambda tp, batch=batch: build(tp, spread=spread, grouped=grouped)(*batch)):
            torch.testing.assert_close(result, naive(*batch), atol=1e-5, rtol=0)


def test_summands_of_ranks_add_up_where_the_caller_reduces() -> None:
    batch = choices(7)
    summands = run_ranks(2, lambda tp: build(tp, reduce=False)(*batch))
    assert not torch.allclose(summands[0], summands[1])
    torch.testing.assert_close(summands[0] + summands[1], naive(*batch), atol=1e-5, rtol=0)


def test_spread_ranks_hold_their_own_experts_only() -> None:
    """The stacked memory of rank 1 of 3 is that of experts 2 and 3."""
    tp = TPGroup(rank=1, size=3, device=torch.device("cpu"))
    experts = build(tp, spread=True)
    held = {index: expert.gate_up.weight.numel() for index, expert in enumerate(experts.all)}
    assert [index for index, count in held.items() if count] == [2, 3]
    torch.testing.assert_close(experts.all[2].gate_up.weight[:WIDTH], checkpoint()["2.gate"])


@pytest.mark.parametrize("width", [8, 6])
def test_grouped_products_of_any_size(width: int) -> None:
    """6 float32 numbers are no multiple of 16 bytes, which torch's own grouped product refuses."""
    torch.manual_seed(0)
    x, weights = torch.randn(9, 8), torch.randn(4, 8, width)
    got = grouped_matmul(x, weights, torch.tensor([3, 3, 8, 9], dtype=torch.int32))
    expected = torch.cat((x[:3] @ weights[0], x[3:8] @ weights[2], x[8:] @ weights[3]))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("device", "dtype", "width", "major", "waits"),
    [
        ("cuda", torch.bfloat16, 8, 9, False),
        ("cuda", torch.bfloat16, 8, 10, False),
        ("cuda", torch.bfloat16, 8, 8, True),
        ("cuda", torch.bfloat16, 12, 9, True),
        ("cuda", torch.float32, 8, 9, True),
        ("cpu", torch.bfloat16, 8, 9, True),
    ],
)
def test_when_grouped_products_wait_for_the_device(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, width: int, major: int, waits: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    weights: Any = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(4, 8, width))
    weights.element_size = lambda: dtype.itemsize
    assert grouped_matmul_waits(weights) is waits


def test_the_best_groups_are_kept() -> None:
    scores = torch.tensor([[5.0, 0.0, 3.0, 3.0, 4.0, 0.0]])  # groups worth 5, 6, 4 by their two best
    kept = keep_best_groups(scores, num_groups=3, num_kept=2, best_of_group=2)
    assert kept.tolist() == [[5.0, 0.0, 3.0, 3.0, -torch.inf, -torch.inf]]
    kept = keep_best_groups(scores, num_groups=3, num_kept=2, best_of_group=1)
    assert kept.tolist() == [[5.0, 0.0, -torch.inf, -torch.inf, 4.0, 0.0]]


def test_weights_of_a_tokens_experts() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    weights, experts = softmax_top_k(logits, 2, renormalize=False)
    assert experts.tolist() == [[2, 1]]
    torch.testing.assert_close(weights, logits.softmax(-1)[:, [2, 1]])
    weights, _ = softmax_top_k(logits, 2, renormalize=True)
    torch.testing.assert_close(weights, logits[:, [2, 1]].softmax(-1))


QUANTIZED_DIM, QUANTIZED_WIDTH = 256, 512


def quantized_checkpoint() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inner, outer = (QUANTIZED_WIDTH, QUANTIZED_DIM), (QUANTIZED_DIM, QUANTIZED_WIDTH)
    shapes = {"gate": inner, "up": inner, "down": outer}
    return {
        f"{index}.{name}": torch.randn(shape, generator=generator) / 16
        for index in range(4)
        for name, shape in shapes.items()
    }


class EachItsOwn(QuantizingSource):
    """Encodings by name; the rest stays plain."""

    def __init__(self, tensors: dict[str, torch.Tensor], encodings: dict[str, str]) -> None:
        self._sources = {name: QuantizingSource(DictWeightSource(tensors), kind) for name, kind in encodings.items()}
        super().__init__(DictWeightSource(tensors), "q4_k")

    def quantization(self, name: str) -> str:
        return self._sources[name].quantization(name) if name in self._sources else ""

    def get_quantized(self, name: str, rows: range, columns: range) -> QuantizedRows:
        return self._sources[name].get_quantized(name, rows, columns)


def quantized_experts(encodings: dict[str, str], grouped: bool | None) -> Experts:
    place = TPGroup.single(torch.device("cpu"))
    experts = Experts(4, QUANTIZED_DIM, QUANTIZED_WIDTH, place, grouped=grouped)
    load_weights(experts.sharded_parameters(), EachItsOwn(quantized_checkpoint(), encodings), NAMES)
    return experts


def kinds(**by_part: str) -> dict[str, str]:
    return {f"{index}.{name}": kind for index in range(4) for name, kind in by_part.items()}


ALIKE = kinds(gate="q4_k", up="q4_k", down="q6_k")
DOWN_ONLY = kinds(down="q8_0")
MIXED_SEGMENTS = kinds(gate="q4_0", up="q5_k", down="q4_k")
UNLIKE = ALIKE | {"2.down": "q4_k"}
PLAIN_AMONG_THEM = {name: kind for name, kind in ALIKE.items() if name != "1.down"}


def quantized_batch(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x, logits = (torch.randn(num_tokens, size, generator=generator) for size in (QUANTIZED_DIM, 4))
    return x, *softmax_top_k(logits, TOP_K, renormalize=True)


@pytest.mark.parametrize("encodings", [ALIKE, DOWN_ONLY, MIXED_SEGMENTS, UNLIKE, PLAIN_AMONG_THEM], ids=range(5))
def test_quantized_experts_in_grouped_products(encodings: dict[str, str]) -> None:
    looped, grouped = (quantized_experts(encodings, grouped) for grouped in (False, True))
    sizes = {name: parameter.data.nbytes for name, parameter in looped.parameters}
    for num_tokens in (1, 9):
        batch = quantized_batch(num_tokens)
        torch.testing.assert_close(grouped(*batch), looped(*batch), atol=1e-5, rtol=1e-5)
    is_stacked = encodings not in (UNLIKE, PLAIN_AMONG_THEM)
    assert (grouped._settled() is not None) == is_stacked
    assert {name: parameter.data.nbytes for name, parameter in grouped.parameters} == sizes
    places = [parameter.data.untyped_storage().data_ptr() for name, parameter in grouped.parameters if "down" in name]
    assert len(set(places)) == (len(places) // 4 if is_stacked else len(places)), "the stack takes no memory of its own"


def test_quantized_experts_are_looped_over_on_a_cpu_and_wait() -> None:
    assert quantized_experts(ALIKE, None)._settled() is None
    assert quantized_experts(ALIKE, None).waits_for_device
    assert quantized_experts(ALIKE, True).waits_for_device, "the reference of the grouped product asks for counts"


def test_quantized_experts_wait_for_nothing_where_groups_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("max_ray.kernels.multiplies_groups", lambda weight, device: True)
    assert quantized_experts(DOWN_ONLY, True).waits_for_device, "the plain product of gate and up does"
    monkeypatch.setattr("max_ray.nn.moe.grouped_matmul_waits", lambda weights: False)
    for encodings in (ALIKE, DOWN_ONLY, MIXED_SEGMENTS):
        assert not quantized_experts(encodings, True).waits_for_device
    assert quantized_experts(UNLIKE, True).waits_for_device


@pytest.mark.parametrize("spread", [False, True])
def test_quantized_experts_over_ranks(spread: bool) -> None:
    batch = quantized_batch(9)
    expected = quantized_experts(ALIKE, False)(*batch)

    def run(tp: TPGroup) -> torch.Tensor:
        experts = Experts(4, QUANTIZED_DIM, QUANTIZED_WIDTH, tp, grouped=True, spread=spread)
        load_weights(experts.sharded_parameters(), EachItsOwn(quantized_checkpoint(), ALIKE), NAMES)
        return experts(*batch)

    for result in run_ranks(2, run):
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)

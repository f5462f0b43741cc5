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

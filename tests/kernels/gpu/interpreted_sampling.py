"""The Triton sampler against `pipelines/draw.py` and `philox.py`: the same tokens from the same seeds and counters.

TRITON_INTERPRET=1 python -m pytest tests/kernels/gpu/interpreted_sampling.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from max_ray.engine.sampling.draw import Filters, draw_filtered
from max_ray.engine.sampling.philox import uniforms
from max_ray.interfaces.request import SamplingParams
from max_ray.kernels.gpu import sampling

CPU = torch.device("cpu")


def column_of_seeds(seeds: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.array([seed % 2**64 for seed in seeds], dtype=np.uint64).view(np.int64))


def check(logits: torch.Tensor, params: Sequence[SamplingParams], counters: Sequence[int]) -> torch.Tensor:
    """Row i with params[i] draws number counters[i] of its seed."""
    seeds = [p.seed for p in params]
    filters = Filters.from_params(params, logits.shape[1], CPU)
    uniform = uniforms(seeds, np.array(counters, dtype=np.int64), 1)[:, 0]
    expected = draw_filtered(logits.float(), filters, torch.from_numpy(uniform))
    columns = (filters.temperature, filters.top_k, filters.top_p, filters.min_p)
    actual = sampling.sample(logits, *columns, column_of_seeds(seeds), torch.tensor(counters))
    assert torch.equal(actual, expected)
    return actual


@triton.jit
def uniform_kernel(seeds, counters, out):
    number = tl.program_id(0)
    tl.store(out + number, sampling.uniform_number(tl.load(seeds + number), tl.load(counters + number)))


def test_uniform_numbers_are_those_of_philox() -> None:
    seeds = [0, 1, -1, 2**31, 2**32 + 5, 2**63 - 1, -(2**63), 2**64 - 2, 123456789123456789]
    counters = torch.tensor([0, 1, 2, 31, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 7])
    out = torch.empty(len(seeds), dtype=torch.float64)
    uniform_kernel[(len(seeds),)](column_of_seeds(seeds), counters, out)
    assert out.tolist() == uniforms(seeds, counters.numpy(), 1)[:, 0].tolist()


FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 10_000},
    {"top_p": 1e-9},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7, "min_p": 0.05, "temperature": 0.3},
    {"top_p": 0.9, "temperature": 5.0},
    {"top_k": 5, "temperature": 0.01},
]


@pytest.mark.parametrize("vocab_size", [1, 33, *(pytest.param(v, marks=pytest.mark.slow) for v in (4096, 5000, 8193))])
def test_filters(vocab_size: int) -> None:
    logits = torch.randn(len(FILTERS), vocab_size) * 3
    params = [SamplingParams(**{"temperature": 1.0, "seed": n} | some) for n, some in enumerate(FILTERS)]
    check(logits, params, list(range(len(FILTERS))))


def test_vocabularies_of_several_blocks() -> None:
    combined = [{"top_k": 40, "top_p": 0.9}, {"top_p": 0.99, "temperature": 3.0}]
    params = [SamplingParams(**{"temperature": 1.0, "seed": 3} | some) for some in combined]
    check(torch.randn(2, 4097), params, [0, 1])


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.5}, {"top_p": 0.3, "top_k": 3}, {"min_p": 1.0}], ids=str)
def test_ties_are_kept_whole(filters: dict[str, float]) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0, -0.0, 2.0, 1.0]]).repeat(4, 1)
    params = [SamplingParams(**{"temperature": 1.0, "seed": seed} | filters) for seed in range(4)]
    drawn = check(logits, params, [0] * 4)
    assert set(drawn.tolist()) <= {1, 2, 3, 6}
    assert len(set(drawn.tolist())) > 1


@pytest.mark.parametrize("zeros", [[-0.0, 0.0], [0.0, -0.0]], ids=str)
def test_zeros_of_both_signs_are_one_value(zeros: list[float]) -> None:
    logits = torch.tensor([[*zeros, -5.0, *zeros]]).repeat(6, 1)
    params = [SamplingParams(temperature=1.0, top_k=1, seed=seed) for seed in range(6)]
    drawn = set(check(logits, params, [3] * 6).tolist())
    assert drawn <= {0, 1, 3, 4}
    assert drawn & {0, 3}
    assert drawn & {1, 4}


@triton.jit
def first_beyond_kernel(logits, targets, out, vocab_size, BLOCK: tl.constexpr):
    number = tl.program_id(0)
    target = tl.load(targets + number)
    token = sampling._first_beyond(logits, vocab_size, 0.0, 1.0, sampling._LOWEST, 0.0, target, BLOCK)
    tl.store(out + number, token)


@pytest.mark.parametrize("block", [2, 8])
def test_the_draw_at_the_borders_between_tokens(block: int) -> None:
    one = 2**40
    borders = {0: 1, one - 1: 1, one: 2, 2 * one - 1: 2, 2 * one: 4, 3 * one - 1: 4}
    targets, out = torch.tensor(list(borders)), torch.empty(len(borders), dtype=torch.int64)
    logits = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf, 0.0])
    first_beyond_kernel[(len(borders),)](logits, targets, out, 5, BLOCK=block)
    assert out.tolist() == list(borders.values())


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((6, 40), -torch.inf)
    logits[:, 7], logits[:, 39] = 1.0, 1.5
    filters = [{}, {"top_k": 3}, {"top_p": 0.99}, {"top_k": 39, "top_p": 0.1}, {"min_p": 0.5}, {"top_k": 1}]
    params = [SamplingParams(**{"temperature": 1.0, "seed": 4} | some) for some in filters]
    assert set(check(logits, params, [2] * 6).tolist()) <= {7, 39}


def test_a_row_that_can_draw_nothing_gets_a_token_and_its_neighbours_theirs() -> None:
    logits = torch.randn(4, 50)
    params = [SamplingParams(temperature=1.0, top_p=0.9, seed=seed) for seed in range(4)]
    alone = check(logits, params, [0] * 4)
    logits[1], logits[2] = -torch.inf, torch.nan
    columns = [
        getattr(Filters.from_params(params, 50, CPU), name) for name in ("temperature", "top_k", "top_p", "min_p")
    ]
    tokens = sampling.sample(logits, *columns, column_of_seeds(range(4)), torch.zeros(4, dtype=torch.int64))
    assert tokens.tolist() == [int(alone[0]), 0, 0, int(alone[3])]


def test_bfloat16_and_rows_of_a_wider_tensor() -> None:
    logits = (torch.randn(4, 90).bfloat16() * 2)[:, :77]
    check(logits, [SamplingParams(temperature=0.8, top_k=7, top_p=0.8, seed=s) for s in range(4)], [1, 2, 3, 4])


def test_no_rows() -> None:
    none = torch.empty(0)
    columns = (none, none.long(), none.double(), none, none.long(), none.long())
    assert sampling.sample(torch.empty(0, 9), *columns).shape == (0,)


@pytest.mark.slow
def test_many_draws_of_one_row_equal_the_reference() -> None:
    logits = torch.randn(1, 300).repeat(100, 1) * 2
    check(logits, [SamplingParams(temperature=1.2, top_p=0.95, seed=11)] * 100, list(range(100)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_parameters_on_a_large_vocabulary(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(size=(6, 32_003)) * random.uniform(0.1, 6)).float()
    params = [
        SamplingParams(
            temperature=random.uniform(0.1, 2),
            top_k=int(random.integers(0, 500)),
            top_p=random.uniform(0.1, 1),
            min_p=random.uniform(0, 0.1),
            seed=int(random.integers(2**62)),
        )
        for _ in range(6)
    ]
    check(logits, params, list(range(6)))

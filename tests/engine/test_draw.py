"""Filters and the draw against the naive sampler: borders first, then random cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from max_ray.engine.sampling import draw as draw_module
from max_ray.engine.sampling.draw import Filters, draw, draw_filtered
from max_ray.interfaces import SamplingParams
from tests.engine import naive_sampler

CPU = torch.device("cpu")
LAST_UNIFORM = 1 - 2.0**-32


def ours(logits: torch.Tensor, params: SamplingParams, uniform: torch.Tensor) -> list[int]:
    """Tokens for one row of logits under each of the uniform numbers."""
    rows = logits.expand(len(uniform), -1).contiguous()
    filters = Filters.from_params([params] * len(uniform), logits.shape[-1], CPU)
    return draw_filtered(rows, filters, uniform).tolist()


def reachable(logits: list[float], **params: float) -> set[int]:
    uniform = torch.tensor([*np.linspace(0, 1, 2001)[:-1], LAST_UNIFORM], dtype=torch.float64)
    return set(ours(torch.tensor([logits]), SamplingParams(**params), uniform))


def test_top_k_keeps_k_and_ties_with_the_last() -> None:
    assert reachable([0.0, 3.0, 1.0, 2.0], top_k=2) == {1, 3}
    assert reachable([1.0, 3.0, 1.0, 1.0, 0.0], top_k=2) == {0, 1, 2, 3}


@pytest.mark.parametrize("top_k", [-1, 0, 4, 5, 10**9])
def test_top_k_off_or_at_least_the_vocabulary_keeps_all(top_k: int) -> None:
    assert reachable([0.0, 3.0, 1.0, 2.0], top_k=top_k) == {0, 1, 2, 3}


@pytest.mark.parametrize(("top_p", "kept"), [(1e-9, {0}), (0.5, {0}), (0.51, {0, 1}), (0.8, {0, 1}), (0.81, {0, 1, 2})])
def test_top_p_keeps_the_shortest_head_with_the_mass(top_p: float, kept: set[int]) -> None:
    assert reachable([math.log(5.001), math.log(3.0), math.log(2.0)], top_p=top_p) == kept


def test_top_p_keeps_ties_together() -> None:
    assert reachable([0.0, 0.0, 0.0, 0.0], top_p=0.3) == {0, 1, 2, 3}


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    logits = [math.log(weight) for weight in (4.0, 3.0, 2.0, 1.0)]
    assert reachable(logits, top_p=0.55) == {0, 1}
    assert reachable(logits, top_p=0.55, top_k=2) == {0}  # 4 / 7 of the mass


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = [math.log(weight) for weight in (10.0, 5.1, 4.9, 1.0)]
    assert reachable(logits, min_p=0.5) == {0, 1}
    assert reachable(logits, min_p=1.0) == {0}
    assert reachable(logits, min_p=0.5, temperature=2.0) == {0, 1, 2}  # sqrt(0.1) < 0.5 < sqrt(0.49)


def test_extreme_uniforms_never_pick_a_dropped_or_impossible_token() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -1000.0, 1.0, -math.inf]])
    uniform = torch.tensor([0.0, LAST_UNIFORM], dtype=torch.float64)
    rows = logits.expand(2, -1)
    assert draw(rows, torch.ones(2, 1), uniform).tolist() == [1, 3]
    assert ours(logits, SamplingParams(top_p=0.999), uniform) == [1, 3]
    assert ours(logits, SamplingParams(min_p=1e-6), uniform) == [1, 3]
    assert ours(logits, SamplingParams(top_k=4), uniform) == [1, 3]


def test_lowest_temperature_is_the_argmax_and_highest_is_flat() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.5]])
    uniform = torch.tensor([0.0, 0.5, LAST_UNIFORM], dtype=torch.float64)
    assert ours(logits, SamplingParams(temperature=1e-300, top_k=3), uniform) == [1, 1, 1]
    assert ours(logits, SamplingParams(temperature=1e9, top_k=3), uniform) == [0, 1, 2]


@pytest.mark.parametrize("bad", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize("vocab_size", [1, 10, 11, 3000])
def test_a_row_without_a_distribution_gets_a_token_and_disturbs_nobody(vocab_size: int, bad: float) -> None:
    torch.manual_seed(2)
    logits, uniform = torch.randn(3, vocab_size), torch.rand(3, dtype=torch.float64)
    filters = Filters.from_params([SamplingParams(top_p=0.9)] * 3, vocab_size, CPU)
    before = draw(logits, filters.temperature, uniform), draw_filtered(logits, filters, uniform)
    logits[1] = bad
    after = draw(logits, filters.temperature, uniform), draw_filtered(logits, filters, uniform)
    for good, tokens in zip(before, after, strict=True):
        assert 0 <= tokens[1] < vocab_size
        assert tokens[[0, 2]].tolist() == good[[0, 2]].tolist()


@pytest.mark.parametrize("temperature", [1e38, 1e39, 1e300])
@pytest.mark.parametrize("top_k", [-1, 3])
def test_a_temperature_beyond_float32_is_flat_over_the_tokens_that_can_come(temperature: float, top_k: int) -> None:
    logits = torch.tensor([[0.0, -torch.inf, 5.0, -torch.inf]]).repeat(4, 1)
    filters = Filters.from_params([SamplingParams(temperature=temperature, top_k=top_k)] * 4, 4, torch.device("cpu"))
    uniform = torch.tensor([0.0, 0.4, 0.6, 0.9], dtype=torch.float64)
    tokens = draw_filtered(logits, filters, uniform) if top_k > 0 else draw(logits, filters.temperature, uniform)
    assert tokens.tolist() == [0, 0, 2, 2]


def test_vocabulary_of_one() -> None:
    assert reachable([5.0], top_k=3, top_p=0.1, min_p=0.9) == {0}


def random_case(rng: np.random.Generator) -> tuple[torch.Tensor, SamplingParams]:
    vocab_size = int(rng.choice([1, 2, 3, 17, 300, 1024, 1025, 3000]))
    logits = rng.normal(size=vocab_size) * rng.choice([0.1, 1, 4, 20])
    if rng.random() < 0.3:
        logits = np.round(logits)  # many ties
    if rng.random() < 0.2:
        logits[rng.integers(0, vocab_size, vocab_size // 2)] = -np.inf
        logits[0] = 0.0
    params = SamplingParams(
        temperature=float(rng.choice([0.3, 0.7, 1.0, 2.5])),
        top_k=int(rng.choice([-1, -1, 2, 5, 40, 700, 2000])),
        top_p=float(rng.choice([1.0, 0.2, 0.9, 0.99, 0.9999])),
        min_p=float(rng.choice([0.0, 0.0, 0.02, 0.3])),
    )
    return torch.tensor(logits, dtype=torch.float32)[None], params


@pytest.mark.parametrize("case", range(200))
def test_random_cases_equal_the_naive_sampler(case: int) -> None:
    rng = np.random.default_rng(case)
    logits, params = random_case(rng)
    uniform = torch.from_numpy(rng.random(24))
    probabilities = naive_sampler.kept_probabilities(logits[0].tolist(), params)
    compared = 0
    for token, number in zip(ours(logits, params, uniform), uniform.tolist(), strict=True):
        wanted, distance = naive_sampler.pick(probabilities, number)
        if distance > 1e-6:  # closer to a border than float32 can tell
            assert token == wanted
            compared += 1
    assert compared >= 20


def test_rows_that_the_candidates_do_not_decide_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens whether many candidates are looked at or few, so that the whole vocabulary must be sorted."""
    torch.manual_seed(0)
    logits, uniform = torch.randn(32, 2000).round(decimals=1), torch.rand(32, dtype=torch.float64)
    params = [SamplingParams(top_p=0.95, top_k=-1 if i % 2 else 1500) for i in range(32)]
    whole = draw_filtered(logits, Filters.from_params(params, 2000, CPU), uniform)
    few = Filters.from_params(params, 2000, CPU)
    object.__setattr__(few, "num_candidates", 8)
    sorted_rows = []
    real = draw_module._draw_sorted
    monkeypatch.setattr(draw_module, "_draw_sorted", lambda *args: (sorted_rows.append(len(args[0])), real(*args))[1])
    assert torch.equal(draw_filtered(logits, few, uniform), whole)
    assert sum(sorted_rows) == 32


def test_draws_follow_the_distribution() -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 40)
    params = SamplingParams(temperature=1.3, top_k=25, min_p=0.01)
    probabilities = naive_sampler.kept_probabilities(logits[0].tolist(), params)
    num_draws = 50_000
    counts = np.bincount(ours(logits, params, torch.rand(num_draws, dtype=torch.float64)), minlength=40)
    expected = np.array([probabilities.get(i, 0.0) * num_draws for i in range(40)])
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert freedom >= 15
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)

"""The sampler of a run: penalties, masks, reports and independence of the batch, against the naive sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from max_ray.engine.sampling.philox import uniforms
from max_ray.engine.sampling.sampler import Sampler, prompt_logprobs
from max_ray.interfaces import SamplingParams
from max_ray.interfaces.executor import RunRow
from tests.engine import naive_sampler

CPU = torch.device("cpu")
VOCAB_SIZE = 50


def make_row(
    *,
    prompt: tuple[int, ...] = (1, 2),
    output: tuple[int, ...] = (),
    stop_ids: tuple[int, ...] = (),
    logprobs: int | None = None,
    **params: Any,
) -> RunRow:
    history = np.array([*prompt, *output], dtype=np.int64)
    return RunRow(
        request_id="r",
        active_tokens=history[-1:],
        processed_length=len(history) - 1,
        block_table=np.zeros(1, dtype=np.int32),
        max_new_tokens=100,
        sampling_params=SamplingParams(**{"seed": 0, **params}),
        stop_ids=frozenset(stop_ids),
        generated_length=len(output),
        prompt_length=len(prompt),
        history=history if SamplingParams(**params).needs_penalties else None,
        log_probabilities=logprobs,
    )


def step(rows: list[RunRow], logits: torch.Tensor) -> list[int]:
    return Sampler(rows, logits.shape[1], CPU).sample(logits, range(len(rows))).tokens.tolist()


def naive_token(row: RunRow, logits: torch.Tensor, output: list[int]) -> int:
    """What `row`, having generated `output`, must get from logits [V]."""
    params = row.sampling_params
    prompt = [] if row.history is None else row.history[: row.prompt_length].tolist()
    edited = naive_sampler.penalize(logits.tolist(), params, prompt, output)
    if len(output) < params.min_new_tokens:
        edited = naive_sampler.forbid(edited, sorted(row.stop_ids))
    if params.is_greedy:
        return max(range(len(edited)), key=edited.__getitem__)
    uniform = uniforms([params.seed], np.array([len(output)]), 1)[0, 0]
    return naive_sampler.pick(naive_sampler.kept_probabilities(edited, params), uniform)[0]


def mixed_rows() -> list[RunRow]:
    """16 rows, every kind of parameter, some with tokens generated before this run."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": 1},
        {},
        {"temperature": 1.7, "output": (4, 4, 9)},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8},
        {"repetition_penalty": 1.4, "temperature": 0.0, "output": (3, 3)},
        {"frequency_penalty": 0.7, "presence_penalty": -0.4, "output": (3, 8, 3)},
        {"repetition_penalty": 0.8, "frequency_penalty": 1.0, "top_p": 0.7},
        {"min_new_tokens": 3, "stop_ids": tuple(range(25)), "temperature": 0.0},
        {"min_new_tokens": 5, "stop_ids": tuple(range(40)), "output": (41, 42)},
        {"logprobs": 3},
        {"logprobs": 0, "temperature": 0.0},
        {"presence_penalty": 2.0, "logprobs": 5, "min_new_tokens": 100, "stop_ids": (7, 10**6, -3)},
    ]
    return [make_row(seed=seed * 1000 + 17, **kind) for seed, kind in enumerate(kinds)]


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[0, [7, 30]] = 1.0
    assert step([make_row(temperature=0), make_row(top_k=1)], logits) == [7, 0]


def test_logits_of_the_caller_stay_as_they_are() -> None:
    rows = mixed_rows()
    logits = torch.randn(len(rows), VOCAB_SIZE)
    before = logits.clone()
    step(rows, logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_sampled_in_float32(dtype: torch.dtype) -> None:
    rows = mixed_rows()
    logits = torch.randn(len(rows), VOCAB_SIZE).to(dtype)
    assert step(rows, logits) == step(rows, logits.float())


def test_mixed_batch_equals_the_naive_sampler_over_many_steps() -> None:
    rows = mixed_rows()
    sampler = Sampler(rows, VOCAB_SIZE, CPU)
    generator = torch.Generator().manual_seed(0)
    outputs = [[] if r.history is None else r.history[r.prompt_length :].tolist() for r in rows]
    outputs = [out or [41, 42, 43][: r.generated_length] for out, r in zip(outputs, rows, strict=True)]
    for _ in range(40):  # more than the random numbers made ahead
        logits = torch.randn(len(rows), VOCAB_SIZE, generator=generator) * 2
        expected = [naive_token(row, logits[i], outputs[i]) for i, row in enumerate(rows)]
        tokens = sampler.sample(logits, range(len(rows))).tokens.tolist()
        assert tokens == expected
        for output, token in zip(outputs, tokens, strict=True):
            output.append(token)


def test_every_row_is_independent_of_its_batch() -> None:
    rows = mixed_rows()
    logits = [torch.randn(len(rows), VOCAB_SIZE, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    together = Sampler(rows, VOCAB_SIZE, CPU)
    batch = [together.sample(step_logits, range(len(rows))) for step_logits in logits]
    for i, row in enumerate(rows):
        alone = Sampler([row], VOCAB_SIZE, CPU)
        for step_logits, result in zip(logits, batch, strict=True):
            single = alone.sample(step_logits[i : i + 1], [0])
            assert single.tokens[0] == result.tokens[i]
            if row.log_probabilities is not None:
                assert single.log_probabilities is not None
                assert result.log_probabilities is not None
                assert single.log_probabilities[0] == result.log_probabilities[i]


def test_rows_may_leave_the_batch() -> None:
    rows = mixed_rows()
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(len(rows), VOCAB_SIZE, generator=generator) for _ in range(6)]
    whole, shrinking = Sampler(rows, VOCAB_SIZE, CPU), Sampler(rows, VOCAB_SIZE, CPU)
    alive = list(range(len(rows)))
    for i, step_logits in enumerate(logits):
        expected = whole.sample(step_logits, range(len(rows))).tokens[alive]
        assert torch.equal(shrinking.sample(step_logits[alive], alive).tokens, expected)
        alive = [row for row in alive if (row + i) % 11]
    assert 0 < len(alive) < len(rows)


def test_one_run_of_8_equals_8_runs_of_1() -> None:
    kinds: list[dict[str, Any]] = [
        {"seed": 5},
        {"seed": -1, "top_k": 9, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
        {"seed": 2**63, "top_p": 0.9, "min_new_tokens": 4, "stop_ids": tuple(range(30))},
    ]
    generator = torch.Generator().manual_seed(4)
    logits = [torch.randn(len(kinds), VOCAB_SIZE, generator=generator) for _ in range(8)]
    long_run = Sampler([make_row(**kind) for kind in kinds], VOCAB_SIZE, CPU)
    outputs: list[tuple[int, ...]] = [()] * len(kinds)
    for step_logits in logits:
        rows = [make_row(output=output, **kind) for output, kind in zip(outputs, kinds, strict=True)]
        expected = long_run.sample(step_logits, range(len(kinds))).tokens.tolist()
        assert step(rows, step_logits) == expected
        outputs = [(*output, token) for output, token in zip(outputs, expected, strict=True)]


def test_seeds_matter_and_repeat() -> None:
    logits = torch.zeros(6, VOCAB_SIZE)
    seeds = [0, 2**63, -1, 2**64 - 1, -(2**63), 1]
    tokens = step([make_row(seed=seed) for seed in seeds], logits)
    assert tokens[1] == tokens[4]  # the same 64 bits
    assert tokens[2] == tokens[3]
    assert len(set(tokens)) > 2


def test_min_tokens_mask_ends_with_the_minimum() -> None:
    rows = [make_row(temperature=0, min_new_tokens=2, stop_ids=(9,)), make_row(temperature=0, stop_ids=(9,))]
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, 9] = 5.0
    sampler = Sampler(rows, VOCAB_SIZE, CPU)
    steps = [sampler.sample(logits, [0, 1]).tokens.tolist() for _ in range(3)]
    assert steps == [[0, 9], [0, 9], [9, 9]]


def test_a_request_that_forbids_every_token_does_not_end_the_run() -> None:
    forbidding = {"min_new_tokens": 5, "stop_ids": tuple(range(VOCAB_SIZE))}
    rows = [make_row(**forbidding, top_k=3), make_row(**forbidding), make_row(**forbidding, temperature=0), make_row()]
    logits = torch.randn(4, VOCAB_SIZE)
    tokens = step(rows, logits)
    assert all(0 <= token < VOCAB_SIZE for token in tokens)
    assert tokens[3] == naive_token(rows[3], logits[3], [])


@pytest.mark.parametrize("case", range(50))
def test_penalties_equal_the_naive_ones(case: int) -> None:
    rng = np.random.default_rng(case)
    output = rng.integers(0, VOCAB_SIZE, rng.integers(0, 30)).tolist()
    prompt = rng.integers(0, VOCAB_SIZE, rng.integers(1, 30)).tolist()
    penalties = {
        "repetition_penalty": float(rng.choice([1.0, 0.5, 1.2, 2.0])),
        "frequency_penalty": float(rng.choice([0.0, -1.5, 0.3, 2.0])),
        "presence_penalty": float(rng.choice([0.0, -2.0, 0.7])),
    }
    row = make_row(prompt=tuple(prompt), output=tuple(output), temperature=0, logprobs=VOCAB_SIZE, **penalties)
    logits = torch.from_numpy(rng.normal(size=(1, VOCAB_SIZE)) * 3).float()
    expected = naive_sampler.penalize(logits[0].tolist(), row.sampling_params, prompt, output)
    entries = Sampler([row], VOCAB_SIZE, CPU).sample(logits, [0]).log_probabilities
    assert entries is not None
    reported = [value for _, value in sorted(entries[0].top)]
    np.testing.assert_allclose(reported, naive_sampler.log_softmax(expected), atol=1e-5)


def test_log_probabilities_are_taken_before_temperature_and_filters() -> None:
    logits = torch.randn(3, VOCAB_SIZE)
    rows = [make_row(logprobs=2, temperature=0.3, top_k=4), make_row(), make_row(logprobs=0, temperature=0)]
    sampled = Sampler(rows, VOCAB_SIZE, CPU).sample(logits, range(3))
    entries = sampled.log_probabilities
    assert entries is not None
    assert sorted(entries) == [0, 2]
    expected = naive_sampler.log_softmax(logits[0].tolist())
    best = sorted(range(VOCAB_SIZE), key=lambda i: -expected[i])[:2]
    assert entries[0].token_id == sampled.tokens[0]
    assert entries[0].log_probability == pytest.approx(expected[entries[0].token_id], abs=1e-5)
    assert [token for token, _ in entries[0].top] == best
    assert [value for _, value in entries[0].top] == pytest.approx([expected[i] for i in best], abs=1e-5)
    assert entries[2].top == []


def test_more_alternatives_than_the_vocabulary() -> None:
    entries = Sampler([make_row(logprobs=20)], 4, CPU).sample(torch.randn(1, 4), [0]).log_probabilities
    assert entries is not None
    assert len(entries[0].top) == 4


def test_no_report_is_made_when_nobody_asks() -> None:
    assert Sampler([make_row()], VOCAB_SIZE, CPU).sample(torch.randn(1, VOCAB_SIZE), [0]).log_probabilities is None


@pytest.mark.parametrize("num_tokens", [0, 1, 127, 128, 129, 300])
def test_prompt_log_probabilities(num_tokens: int) -> None:
    logits = torch.randn(num_tokens, 11)
    tokens = torch.randint(0, 11, (num_tokens,))
    entries = prompt_logprobs(logits, tokens, 3)
    assert [entry.token_id for entry in entries] == tokens.tolist()
    for entry, line in zip(entries, logits.tolist(), strict=True):
        expected = naive_sampler.log_softmax(line)
        assert entry.log_probability == pytest.approx(expected[entry.token_id], abs=1e-5)
        assert [token for token, _ in entry.top] == sorted(range(11), key=lambda i: -expected[i])[:3]
    assert prompt_logprobs(logits, tokens.tolist(), 3) == entries


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_a_penalty_beyond_float32_gives_numbers(penalty: float) -> None:
    row = make_row(prompt=(1, 2), logprobs=0, repetition_penalty=penalty, temperature=0.0)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, :4] = torch.tensor([-1.0, 2.0, 0.0, 1.0])
    sampled = Sampler([row], VOCAB_SIZE, CPU).sample(logits, [0])
    assert sampled.tokens.tolist() == [1 if penalty < 1 else 3]
    assert sampled.log_probabilities is not None
    assert np.isfinite(sampled.log_probabilities[0].log_probability)

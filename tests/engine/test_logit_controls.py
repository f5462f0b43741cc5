"""Logit controls in the sampler: each one's effect, and 200 mixed batches against the naive definition."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from max_ray.engine.sampling.dry import Dry, repetitions
from max_ray.engine.sampling.philox import uniforms
from max_ray.engine.sampling.sampler import Sampler, needs_host
from max_ray.errors import InputError
from max_ray.interfaces import LogitControls, SamplingParams
from max_ray.interfaces.executor import RunRow
from tests.engine import naive_controls, naive_sampler

CPU = torch.device("cpu")
VOCAB_SIZE = 40
NEAR_A_BORDER = 1e-5


def make_row(
    prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), logprobs: int | None = None, **params: Any
) -> RunRow:
    controls = {name: params.pop(name) for name in list(params) if hasattr(LogitControls(), name)}
    stop_ids = frozenset(params.pop("stop_ids", ()))
    history = np.array([*prompt, *output], dtype=np.int64)
    sampling = SamplingParams(**{"seed": 0, **params}, logit_controls=LogitControls(**controls) if controls else None)
    return RunRow(
        request_id="r",
        active_tokens=history[-1:],
        processed_length=len(history) - 1,
        block_table=np.zeros(1, dtype=np.int32),
        max_new_tokens=100,
        sampling_params=sampling,
        stop_ids=stop_ids,
        generated_length=len(output),
        prompt_length=len(prompt),
        history=history if sampling.needs_history else None,
        log_probabilities=logprobs,
    )


def entries_of(row: RunRow, logits: torch.Tensor) -> dict[int, float]:
    """Reported log probabilities of one step."""
    row.log_probabilities = logits.shape[1]
    entries = Sampler([row], logits.shape[1], CPU).sample(logits, [0]).log_probabilities
    assert entries is not None
    return dict(entries[0].top)


def tokens_of(row: RunRow, logits: torch.Tensor, num_draws: int = 300) -> set[int]:
    """What may be drawn after one step, by many seeds."""
    rows = [replace(row, sampling_params=replace(row.sampling_params, seed=seed)) for seed in range(num_draws)]
    return set(
        Sampler(rows, logits.shape[1], CPU).sample(logits.expand(num_draws, -1), range(num_draws)).tokens.tolist()
    )


# The effect of each.


def test_a_bias_is_added_before_the_penalties() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    row = make_row(prompt=(0, 1), temperature=0, logit_bias=((1, 4.0), (3, -100.0)), repetition_penalty=2.0)
    expected = naive_sampler.log_softmax([0.0, 2.5, 2.0, -97.0])
    assert entries_of(row, logits) == pytest.approx(dict(enumerate(expected)), abs=1e-4)
    assert Sampler([row], 4, CPU).sample(logits, [0]).tokens.tolist() == [1]


def test_a_bias_of_minus_infinity_forbids() -> None:
    row = make_row(temperature=0, logit_bias=((3, -math.inf),))
    assert entries_of(row, torch.tensor([[0.0, 1.0, 2.0, 90.0]]))[3] == -math.inf


def test_only_allowed_tokens_come() -> None:
    assert tokens_of(make_row(allowed_token_ids=(3, 9, 30)), torch.randn(1, VOCAB_SIZE) * 3) <= {3, 9, 30}
    assert tokens_of(make_row(allowed_token_ids=(3, 9, 30)), torch.zeros(1, VOCAB_SIZE)) == {3, 9, 30}


def test_a_bad_word_is_forbidden_behind_its_beginning_alone() -> None:
    words = ((7,), (4, 5, 6), (5, 8))
    logits = torch.zeros(1, VOCAB_SIZE)
    for output, forbidden in [((), {7}), ((5,), {7, 8}), ((4, 5), {6, 7, 8}), ((4,), {7}), ((4, 5, 1), {7})]:
        found = entries_of(make_row(output=output, bad_words=words), logits)
        assert {token for token, value in found.items() if value == -math.inf} == forbidden
    found = entries_of(make_row(prompt=(1, 4, 5), bad_words=words), logits)
    assert {token for token, value in found.items() if value == -math.inf} == {7}, "the prompt does not count"


def test_bad_words_follow_the_tokens_of_the_run() -> None:
    rows = [make_row(temperature=0, bad_words=((3, 3), (2, 3, 5))), make_row(temperature=0)]
    sampler = Sampler(rows, VOCAB_SIZE, CPU)
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, 3], logits[:, 5], logits[:, 2] = 3.0, 2.0, 1.0
    assert [sampler.sample(logits, [0, 1]).tokens.tolist() for _ in range(4)] == [[3, 3], [5, 3], [3, 3], [5, 3]]
    assert sampler.sample(logits[:1], [0]).tokens.tolist() == [3]


@pytest.mark.parametrize("last_n", [0, 1, 3, 5, 6, 100])
def test_penalties_of_a_window(last_n: int) -> None:
    penalties = {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    row = make_row(prompt=(1, 2, 2), output=(5, 2, 5), repeat_last_n=last_n, **penalties)
    logits = torch.linspace(-2, 2, 8)[None]
    expected = naive_controls.edited(logits[0].tolist(), row.sampling_params, (1, 2, 2), (5, 2, 5), ())
    found = entries_of(row, logits)
    assert found == pytest.approx(dict(enumerate(naive_sampler.log_softmax(expected))), abs=1e-5)


def test_dry_takes_more_from_longer_repetitions() -> None:
    row = make_row(prompt=(1, 2, 3, 4, 9, 2, 3, 5, 9, 1, 2, 3), dry_multiplier=0.5, dry_base=2.0)
    logits = torch.zeros(1, 10)
    found = entries_of(row, logits)
    plain = found[0]
    assert found[4] == pytest.approx(plain - 0.5 * 2.0**1), "1 2 3 stood before 4"
    assert found[5] == pytest.approx(plain - 0.5 * 2.0**0), "2 3 stood before 5"
    assert found[9] == pytest.approx(plain)


def test_a_breaker_ends_repetitions() -> None:
    text = np.array([1, 2, 3, 4, 9, 1, 2, 3], dtype=np.int64)
    controls = LogitControls(dry_multiplier=1.0)
    assert Dry(controls, 10).penalties(text)[0].tolist() == [4]
    assert Dry(replace(controls, dry_breakers=((2,),)), 10).penalties(text)[0].tolist() == []
    assert Dry(replace(controls, dry_breakers=((1,),)), 10).penalties(text)[0].tolist() == [4], "2 3 is left"
    assert Dry(replace(controls, dry_breakers=((1, 2),)), 10).penalties(text)[0].tolist() == []
    assert Dry(replace(controls, dry_breakers=((1, 3),)), 10).penalties(text)[0].tolist() == [4], "not in the text"
    assert Dry(replace(controls, dry_penalty_last_n=5), 10).penalties(text)[0].tolist() == []


def test_long_repetitions_give_finite_penalties_in_little_time() -> None:
    text = np.zeros(20_000, dtype=np.int64)
    tokens, penalties = Dry(LogitControls(dry_multiplier=5.0, dry_base=1.75), 4).penalties(text)
    assert tokens.tolist() == [0]
    assert np.isfinite(penalties).all()
    assert penalties[0] > 1e29
    ends, lengths = repetitions(text[:6], 3)
    assert (ends.tolist(), lengths.tolist()) == ([0, 1, 2, 3, 4], [1, 2, 3, 3, 3])


def test_typical_sampling_leaves_out_the_likeliest_token_too() -> None:
    logits = torch.tensor([[0.35, 0.15, 0.15, 0.15, 0.1, 0.1]]).log()
    assert tokens_of(make_row(), logits) == set(range(6))
    assert tokens_of(make_row(typical_p=0.4), logits) == {1, 2, 3}, "nearest to the entropy, with ties"


def test_xtc_removes_all_top_tokens_but_the_least_likely() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]]).log()
    assert tokens_of(make_row(xtc_probability=1.0, xtc_threshold=0.1), logits) == {2, 3, 4}
    assert tokens_of(make_row(xtc_probability=1.0, xtc_threshold=0.35), logits) == {0, 1, 2, 3, 4}, "one top token"
    assert tokens_of(make_row(xtc_probability=1.0, xtc_threshold=0.6), logits) == {0, 1, 2, 3, 4}, "off"
    assert tokens_of(make_row(xtc_probability=1.0, xtc_threshold=0.1, top_k=2), logits) == {1}, "after top-k"


def test_xtc_applies_as_often_as_it_is_told_to() -> None:
    logits = torch.tensor([[0.5, 0.5]]).log().expand(4000, -1) + torch.tensor([[0.01, 0.0]])
    rows = [make_row(seed=seed, xtc_probability=0.3, xtc_threshold=0.1) for seed in range(4000)]
    share = Sampler(rows, 2, CPU).sample(logits, range(4000)).tokens.double().mean().item()
    assert share == pytest.approx(0.3 + 0.7 * 0.4975, abs=0.03)


def test_greedy_rows_are_not_truncated() -> None:
    row = make_row(temperature=0, typical_p=0.1, xtc_probability=1.0)
    assert Sampler([row], 4, CPU).sample(torch.tensor([[3.0, 1.0, 1.0, 1.0]]), [0]).tokens.tolist() == [0]


def test_ids_outside_the_vocabulary_do_no_harm() -> None:
    row = make_row(
        logit_bias=((10**6, 5.0),),
        allowed_token_ids=(10**6, 3),
        bad_words=((10**6,), (-1, 2)),
        dry_multiplier=1.0,
        dry_breakers=((10**6,), (-1,)),
    )
    assert Sampler([row], 4, CPU).sample(torch.zeros(1, 4), [0]).tokens.tolist() == [3]


@pytest.mark.parametrize(
    "wrong",
    [
        {"logit_bias": ((1, 100.5),)},
        {"logit_bias": ((1, math.nan),)},
        {"logit_bias": tuple((i, 0.0) for i in range(1025))},
        {"allowed_token_ids": ()},
        {"bad_words": ((),)},
        {"typical_p": 0.0},
        {"typical_p": 1.1},
        {"typical_p": math.nan},
        {"xtc_probability": -0.1},
        {"xtc_threshold": 1.1},
        {"dry_multiplier": -1.0},
        {"dry_base": 0.9},
        {"dry_allowed_length": 0},
        {"dry_penalty_last_n": -2},
        {"repeat_last_n": -2},
        {"repeat_last_n": 2**40},
    ],
)
def test_values_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        LogitControls(**wrong)
    assert error.value.param == next(iter(wrong))


# Against the naive definition.


def random_row(rng: random.Random, seed: int) -> RunRow:
    def ids(most: int, of: int = VOCAB_SIZE) -> tuple[int, ...]:
        return tuple(rng.randrange(of) for _ in range(rng.randint(0, most)))

    kinds: list[dict[str, Any]] = [
        {"logit_bias": tuple((i, rng.uniform(-9, 9)) for i in set(ids(9)))},
        {"allowed_token_ids": (*ids(20), 1, 2)},
        {"bad_words": tuple((*ids(2, 6), rng.randrange(6)) for _ in range(6))},
        {"repeat_last_n": rng.randint(0, 12), "repetition_penalty": 1.7, "frequency_penalty": rng.choice([0.0, 0.4])},
        {"presence_penalty": 0.8},
        {"typical_p": rng.uniform(0.1, 1)},
        {"xtc_probability": rng.choice([0.5, 1.0]), "xtc_threshold": rng.uniform(0, 0.5)},
        {
            "dry_multiplier": 0.7,
            "dry_allowed_length": rng.randint(1, 3),
            "dry_penalty_last_n": rng.choice([-1, 8]),
            "dry_breakers": tuple((*ids(1, 9), rng.randrange(9)) for _ in range(2)),
        },
        {"top_k": rng.randint(1, 20)},
        {"top_p": rng.uniform(0.2, 1)},
        {"min_p": rng.uniform(0, 0.2)},
        {"temperature": rng.choice([0.0, 0.6, 1.5])},
        {"min_new_tokens": 12, "stop_ids": (1, 2, 3)},
    ]
    wanted: dict[str, Any] = {}
    for kind in rng.sample(kinds, rng.randint(0, 5)):
        wanted |= kind
    return make_row(prompt=(*ids(8, 6), 1), output=ids(8, 6), seed=seed, **wanted)


def naive_token(row: RunRow, logits: list[float], prompt: list[int], output: list[int]) -> tuple[int, float]:
    """The token of a row, and how near the draw was to another one."""
    params = row.sampling_params
    edited = naive_controls.edited(logits, params, prompt, output, sorted(row.stop_ids))
    if params.is_greedy:
        return max(range(len(edited)), key=edited.__getitem__), 1.0
    words = [uniforms([params.seed], np.array([len(output)]), 1, word)[0, 0] for word in (0, 1)]
    left = naive_sampler.kept_probabilities(edited, params)
    if params.logit_controls is not None:
        left = naive_controls.truncated(left, params.logit_controls, words[1])
    return naive_sampler.pick(left, words[0])


@pytest.mark.parametrize("case", range(200))
def test_mixed_batches_equal_the_naive_sampler(case: int) -> None:
    """Four steps with a row that leaves, then a new run from the texts so far: what preemption and recovery do."""
    rng = random.Random(case)
    rows = [random_row(rng, case * 100 + i) for i in range(5)]
    prompts: list[list[int]] = []
    outputs: list[list[int]] = []
    for row in rows:
        known = row.history
        prompts.append([] if known is None else known[: row.prompt_length].tolist())
        outputs.append([5] * row.generated_length if known is None else known[row.prompt_length :].tolist())
    generator = torch.Generator().manual_seed(case)
    alive = list(range(len(rows)))
    sampler = Sampler(rows, VOCAB_SIZE, CPU)
    for step in range(6):
        if step == 2:
            alive = [i for i in alive if i != case % 5]
        if step == 4:
            rows = [moved(row, prompts[i], outputs[i]) for i, row in enumerate(rows)]
            sampler = Sampler(rows, VOCAB_SIZE, CPU)
        logits = torch.randn(len(rows), VOCAB_SIZE, generator=generator) * 2
        tokens = sampler.sample(logits[alive], alive).tokens.tolist()
        alone = {i: Sampler([moved(rows[i], prompts[i], outputs[i])], VOCAB_SIZE, CPU) for i in alive}
        for i, token in zip(alive, tokens, strict=True):
            expected, distance = naive_token(rows[i], logits[i].tolist(), prompts[i], outputs[i])
            assert token == expected or distance < NEAR_A_BORDER, (step, i, rows[i].sampling_params)
            assert alone[i].sample(logits[i : i + 1], [0]).tokens.tolist() == [token], "the batch plays no part"
            outputs[i].append(token)
        sampler.accept(alive, tokens)


def moved(row: RunRow, prompt: list[int], output: list[int]) -> RunRow:
    """The row as another run gets it."""
    history = np.array([*prompt, *output], dtype=np.int64) if row.history is not None else None
    return replace(row, history=history, generated_length=len(output))


def test_rows_that_look_at_the_text_on_the_host() -> None:
    assert needs_host(make_row(dry_multiplier=1.0))
    assert not needs_host(make_row(dry_multiplier=1.0, dry_penalty_last_n=0))
    assert not needs_host(make_row(bad_words=((1, 2),), typical_p=0.5, xtc_probability=0.5, repeat_last_n=4))

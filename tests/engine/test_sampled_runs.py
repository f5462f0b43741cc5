"""Sampling end to end: equal to naive generation over Hugging Face's logits, alone, in a batch, cut up and moved."""

from __future__ import annotations

from typing import Any

import pytest

from max_ray.interfaces import LogitControls, TextContext
from tests import naive
from tests.pipelines.conftest import Lab, execute, make_context, random_prompt, run_to_end

KINDS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.2, "min_p": 0.1},
    "all filters": {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    "greedy repetition": {"repetition_penalty": 1.8},
    "greedy frequency": {"frequency_penalty": 1.9},
    "greedy presence": {"presence_penalty": 2.0},
    "sampled penalties": {
        "temperature": 0.7,
        "repetition_penalty": 0.7,
        "frequency_penalty": -0.5,
        "presence_penalty": 0.3,
    },
    "negative seed": {"temperature": 1.0, "seed": -(2**63)},
    "large seed": {"temperature": 1.0, "seed": 2**63},
}

CONTROLS: dict[str, dict[str, Any]] = {
    "greedy bias": {"logit_bias": tuple((token, -100.0) for token in range(5, 60))},
    "greedy allowed tokens": {"allowed_token_ids": tuple(range(7, 40))},
    "greedy bad words": {"bad_words": tuple((a, b) for a in range(5, 272) for b in (a, a + 1))[:1000]},
    "greedy dry": {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_breakers": ((9,),)},
    "greedy window": {"repetition_penalty": 1.9, "repeat_last_n": 4},
    "dry": {"dry_multiplier": 3.0, "dry_allowed_length": 1, "temperature": 0.7},
    "typical": {"typical_p": 0.3, "temperature": 0.9},
    "xtc": {"xtc_probability": 0.6, "xtc_threshold": 0.01, "temperature": 1.0, "top_k": 30},
}
KINDS_AND_CONTROLS = KINDS | {
    name: {key: value for key, value in kind.items() if not hasattr(LogitControls(), key)}
    | {"logit_controls": LogitControls(**{k: v for k, v in kind.items() if hasattr(LogitControls(), k)})}
    for name, kind in CONTROLS.items()
}


def batch_of_16() -> list[TextContext]:
    """Every kind of sampling once, and greedy rows, over prompts of different lengths."""
    kinds = [*KINDS.values(), *({"temperature": 1.0, "seed": seed} for seed in range(3)), {}, {}]
    return [
        make_context(random_prompt(1 + 3 * i, seed=2), **{"max_new_tokens": 12, "seed": 100 + i, **kind})
        for i, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("num_steps", [1, 8])
@pytest.mark.parametrize("kind", KINDS_AND_CONTROLS)
def test_tokens_and_log_probabilities_equal_naive_generation(lab: Lab, kind: str, num_steps: int) -> None:
    prompt = random_prompt(18, seed=27)  # greedy output that repeats itself, so that penalties bite
    context = make_context(prompt, max_new_tokens=12, logprobs=0, **KINDS_AND_CONTROLS[kind])
    expected = naive.generate(lab.reference, prompt, context.sampling_params, max_new_tokens=12)
    (output,) = run_to_end(lab.pipeline(), [context], num_steps)
    assert output.tokens == expected.tokens
    assert output.log_probabilities is not None
    reported = [entry.log_probability for entry in output.log_probabilities]
    chosen = [line[token] for line, token in zip(expected.logprobs, expected.tokens, strict=True)]
    assert reported == pytest.approx(chosen, abs=1e-4)
    if "greedy" in kind:
        assert output.tokens != lab.greedy(prompt, 12), "the penalty changed nothing: the case tests nothing"


def test_alone_equals_in_a_batch_of_16(lab: Lab) -> None:
    pipeline = lab.pipeline()
    together = [output.tokens for output in run_to_end(pipeline, batch_of_16())]
    alone = [run_to_end(pipeline, [context])[0].tokens for context in batch_of_16()]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == 16


def test_requests_that_come_and_go_at_different_times_get_the_same_tokens(lab: Lab) -> None:
    expected = [output.tokens for output in run_to_end(lab.pipeline(), batch_of_16())]
    pipeline = lab.pipeline(page_size=1)
    contexts = batch_of_16()
    for now in range(20):
        active = [context for i, context in enumerate(contexts) if i // 2 <= now and (i + now) % 3]
        execute(pipeline, active, num_steps=1 + now % 3)
    run_to_end(pipeline, contexts)
    assert [context.tokens.generated.tolist() for context in contexts] == expected


def batch_of_controls() -> list[TextContext]:
    kinds = [*(KINDS_AND_CONTROLS[name] for name in CONTROLS), {}, {"temperature": 1.0}]
    return [
        make_context(random_prompt(3 + 4 * i, seed=5), **{"max_new_tokens": 12, "seed": 9 + i, **kind})
        for i, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("num_before", [1, 7])
def test_controls_alone_in_a_batch_and_after_a_move(lab: Lab, num_before: int) -> None:
    expected = [run_to_end(lab.pipeline(), [context])[0].tokens for context in batch_of_controls()]
    here, there = lab.pipeline(), lab.pipeline(page_size=1)
    contexts = batch_of_controls()
    execute(here, contexts, num_steps=num_before)
    for context in contexts:
        here.release(context.request_id)
        context.reset()
    run_to_end(there, contexts)
    assert [context.tokens.generated.tolist() for context in contexts] == expected


@pytest.mark.parametrize("num_before", [1, 5, 11])
def test_moved_to_another_pipeline_after_a_reset(lab: Lab, num_before: int) -> None:
    """Nothing but the context survives; the tokens so far become a prompt of the other pipeline."""
    expected = [output.tokens for output in run_to_end(lab.pipeline(), batch_of_16())]
    here, there = lab.pipeline(), lab.pipeline(page_size=1)
    contexts = batch_of_16()
    execute(here, contexts, num_steps=num_before)
    for context in contexts:
        here.release(context.request_id)
        context.reset()
    run_to_end(there, contexts)
    assert [context.tokens.generated.tolist() for context in contexts] == expected


@pytest.mark.parametrize("chunk", [7, 16])
def test_sampled_rows_do_not_mind_chunks(lab: Lab, chunk: int) -> None:
    expected = [output.tokens for output in run_to_end(lab.pipeline(), batch_of_16())]
    pipeline = lab.pipeline()
    contexts = batch_of_16()
    while any(context.tokens.generated_length == 0 for context in contexts):
        for context in contexts:
            context.chunk(chunk)
        execute(pipeline, contexts)
    run_to_end(pipeline, contexts)
    assert [context.tokens.generated.tolist() for context in contexts] == expected


def test_different_seeds_differ_and_equal_seeds_repeat(lab: Lab) -> None:
    prompt = random_prompt(10, seed=4)
    contexts = [make_context(prompt, temperature=1.5, seed=seed, max_new_tokens=12) for seed in (0, 1, 2, 1)]
    tokens = [output.tokens for output in run_to_end(lab.pipeline(), contexts)]
    assert tokens[1] == tokens[3]
    assert len({tuple(t) for t in tokens}) == 3

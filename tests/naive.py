"""Naive generation, the slow truth: Hugging Face computes every position anew for each token, the naive sampler picks.

`reference` is a `transformers` model in float32 (`tests.checkpoints.load_reference`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from max_ray.engine.sampling.philox import uniforms
from max_ray.interfaces import SamplingParams
from tests.engine import naive_controls, naive_sampler


@dataclass
class NaiveOutput:
    """tokens; and for each the log-softmax [V] it was picked from (edited, before temperature)."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)


def all_logits(reference: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Float32 logits after every token, [n, V]."""
    with torch.inference_mode():
        logits: torch.Tensor = reference(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits.float()


def generate(
    reference: Any,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
) -> NaiveOutput:
    """Up to `max_new_tokens` tokens; ends after one of `stop_ids`, which `min_new_tokens` holds back."""
    output = NaiveOutput()
    while len(output.tokens) < max_new_tokens:
        logits = all_logits(reference, [*prompt, *output.tokens])[-1].tolist()
        logits = naive_controls.edited(logits, params, prompt, output.tokens, sorted(stop_ids))
        output.logprobs.append(naive_sampler.log_softmax(logits))
        output.tokens.append(_pick(logits, params, len(output.tokens)))
        if output.tokens[-1] in stop_ids:
            break
    return output


def _pick(logits: list[float], params: SamplingParams, number: int) -> int:
    if params.is_greedy:
        return max(range(len(logits)), key=logits.__getitem__)
    token_uniform, xtc_uniform = (uniforms([params.seed], np.array([number]), 1, word)[0, 0] for word in (0, 1))
    left = naive_sampler.kept_probabilities(logits, params)
    if params.logit_controls is not None:
        left = naive_controls.truncated(left, params.logit_controls, xtc_uniform)
    return naive_sampler.pick(left, token_uniform)[0]

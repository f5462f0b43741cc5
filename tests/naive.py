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
from tests.engine import naive_sampler


@dataclass
class NaiveOutput:
    """tokens; and for each the log-softmax [V] it was picked from (penalized, before temperature)."""

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
        logits = naive_sampler.penalize(logits, params, prompt, output.tokens)
        if len(output.tokens) < params.min_new_tokens:
            logits = naive_sampler.forbid(logits, sorted(stop_ids))
        output.logprobs.append(naive_sampler.log_softmax(logits))
        output.tokens.append(_pick(logits, params, len(output.tokens)))
        if output.tokens[-1] in stop_ids:
            break
    return output


def _pick(logits: list[float], params: SamplingParams, number: int) -> int:
    if params.is_greedy:
        return max(range(len(logits)), key=logits.__getitem__)
    uniform = uniforms([params.seed], np.array([number]), 1)[0, 0]
    return naive_sampler.pick(naive_sampler.kept_probabilities(logits, params), uniform)[0]

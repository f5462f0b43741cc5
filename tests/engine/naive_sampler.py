"""The sampler as its documentation reads: one row, plain Python loops over the vocabulary, float64. Tests only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from max_ray.interfaces import SamplingParams


def penalize(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """Repetition over prompt and output, frequency and presence over the output."""
    counts, result = Counter(output), []
    for token, logit in enumerate(logits):
        if token in counts or token in prompt:
            factor = params.repetition_penalty
            logit = logit / factor if logit > 0 else logit * factor
        if token in counts:
            logit -= params.frequency_penalty * counts[token] + params.presence_penalty
        result.append(logit)
    return result


def forbid(logits: Sequence[float], stop_ids: Sequence[int]) -> list[float]:
    return [-math.inf if token in stop_ids else logit for token, logit in enumerate(logits)]


def log_softmax(logits: Sequence[float]) -> list[float]:
    largest = max(logits)
    total = math.log(sum(math.exp(logit - largest) for logit in logits))
    return [logit - largest - total for logit in logits]


def kept_probabilities(logits: Sequence[float], params: SamplingParams) -> dict[int, float]:
    """Token -> probability after temperature, top-k, top-p and min-p, in vocabulary order; ties are kept together."""
    largest = max(logits)
    weights = {i: math.exp((logit - largest) / params.temperature) for i, logit in enumerate(logits)}
    if 0 < params.top_k < len(logits):
        border = sorted(logits, reverse=True)[params.top_k - 1]
        weights = {i: w for i, w in weights.items() if logits[i] >= border}
    if params.top_p < 1:
        weights = _nucleus(logits, weights, params.top_p)
    weights = {i: w for i, w in weights.items() if w >= params.min_p}
    total = sum(weights.values())
    return {i: w / total for i, w in weights.items()}


def _nucleus(logits: Sequence[float], weights: dict[int, float], top_p: float) -> dict[int, float]:
    total, mass, border = sum(weights.values()), 0.0, -math.inf
    for i in sorted(weights, key=lambda i: -logits[i]):
        mass += weights[i]
        if mass >= top_p * total:
            border = logits[i]
            break
    return {i: w for i, w in weights.items() if logits[i] >= border}


def pick(probabilities: dict[int, float], uniform: float) -> tuple[int, float]:
    """The token whose share of [0, 1) holds `uniform`, and the distance from `uniform` to the nearest border."""
    upper, distance, chosen = 0.0, 1.0, -1
    for token, probability in probabilities.items():
        upper += probability
        distance = min(distance, abs(upper - uniform))
        if chosen < 0 and uniform < upper and probability > 0:
            chosen = token
    return chosen, distance

"""LogitControls as their documentation reads: one row, plain Python loops, float64. Tests only."""

from __future__ import annotations

import math
from collections.abc import Sequence

from max_ray.interfaces import LogitControls, SamplingParams
from tests.engine import naive_sampler


def edited(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    stop_ids: Sequence[int],
) -> list[float]:
    """What log probabilities are reported of."""
    controls = params.logit_controls or LogitControls()
    bias = dict(controls.logit_bias)
    result = [logit + bias.get(token, 0.0) for token, logit in enumerate(logits)]
    result = naive_sampler.penalize(result, params, *windowed(prompt, output, controls.repeat_last_n))
    result = [
        logit - taken for logit, taken in zip(result, dry([*prompt, *output], controls, len(logits)), strict=True)
    ]
    if controls.allowed_token_ids is not None:
        result = naive_sampler.forbid(result, [i for i in range(len(result)) if i not in controls.allowed_token_ids])
    result = naive_sampler.forbid(result, banned(output, controls.bad_words))
    return naive_sampler.forbid(result, stop_ids) if len(output) < params.min_new_tokens else result


def windowed(prompt: Sequence[int], output: Sequence[int], last_n: int) -> tuple[list[int], list[int]]:
    """The parts of prompt and output among the last tokens."""
    first = 0 if last_n < 0 else max(0, len(prompt) + len(output) - last_n)
    return list(prompt[first:]), list(output[max(0, first - len(prompt)) :])


def banned(output: Sequence[int], words: Sequence[Sequence[int]]) -> list[int]:
    return [
        word[-1]
        for word in words
        if list(output[len(output) - len(word) + 1 :]) == list(word[:-1]) and len(output) >= len(word) - 1
    ]


def dry(text: Sequence[int], controls: LogitControls, vocab_size: int) -> list[float]:
    """What is taken from each token's logit."""
    taken = [0.0] * vocab_size
    last_n = len(text) if controls.dry_penalty_last_n < 0 else controls.dry_penalty_last_n
    recent = list(text[max(0, len(text) - last_n) :])
    limit = since_breaker(recent, controls.dry_breakers)
    if not controls.uses_dry or len(recent) <= controls.dry_allowed_length:
        return taken
    for token in range(vocab_size):
        longest = 0
        for place in range(1, len(recent)):
            if recent[place] == token:
                longest = max(longest, common_suffix(recent[:place], recent, limit))
        if longest >= controls.dry_allowed_length:
            exponent = longest - controls.dry_allowed_length
            taken[token] = controls.dry_multiplier * controls.dry_base**exponent
    return taken


def since_breaker(text: Sequence[int], breakers: Sequence[Sequence[int]]) -> int:
    """Tokens behind the last breaker: the one whose first token comes last, of these the longest."""
    for place in reversed(range(len(text))):
        found = [len(b) for b in breakers if list(text[place : place + len(b)]) == list(b)]
        if found:
            return len(text) - place - max(found)
    return len(text)


def common_suffix(first: Sequence[int], second: Sequence[int], limit: int) -> int:
    length = 0
    while length < min(limit, len(first)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return length


def truncated(probabilities: dict[int, float], controls: LogitControls, uniform: float) -> dict[int, float]:
    """What typical-p and XTC leave of a distribution."""
    left = normalized(typical(normalized(probabilities), controls.typical_p))
    tops = [token for token, p in left.items() if p >= controls.xtc_threshold]
    if controls.uses_xtc and uniform < controls.xtc_probability and len(tops) > 1:
        least = min(left[token] for token in tops)
        left = {token: p for token, p in left.items() if token not in tops or p == least}
    return normalized(left)


def typical(probabilities: dict[int, float], typical_p: float) -> dict[int, float]:
    if typical_p == 1:
        return probabilities
    entropy = -sum(p * math.log(p) for p in probabilities.values() if p > 0)
    distance = {token: abs(-math.log(p) - entropy) for token, p in probabilities.items() if p > 0}
    mass, kept = 0.0, {}
    for token in sorted(distance, key=distance.__getitem__):
        kept[token] = probabilities[token]
        mass += probabilities[token]
        if mass >= typical_p:
            break
    return {token: p for token, p in probabilities.items() if token in kept}


def normalized(probabilities: dict[int, float]) -> dict[int, float]:
    total = sum(probabilities.values())
    return {token: p / total for token, p in probabilities.items()}

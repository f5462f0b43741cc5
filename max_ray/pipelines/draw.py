"""Filters and the draw: from float32 logits and one uniform number per row to one token per row.

N rows, V tokens in the vocabulary, C candidates (the largest logits of a row, in descending order).

The token depends on nothing but the row's own logits, parameters and uniform number:

* Probabilities are integers: floor(2**40 * exp((logit - max) / temperature)). Integer sums are exact, so no order of
  summation, batch size or device can move the border between two tokens. A token of weight 0 is never drawn.
* Every filter is a threshold on the logit: tokens that tie with the last kept one are all kept. Which of two equal
  logits a device sorts first therefore does not matter.
* The inverse of the cumulative distribution is taken in vocabulary order.

Sorting the vocabulary is avoided: the filters first look at C candidates, and only rows that the candidates do not
decide (the nucleus reaches further) are sorted whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from max_ray.interfaces.request import SamplingParams

_WEIGHT_ONE = 2.0**40  # V * 2**40 stays below 2**63 for any vocabulary under 8 million tokens
_MIN_TEMPERATURE = 1e-30  # positive in float32, so that (max - max) / temperature is 0 and not NaN
_NUCLEUS_CANDIDATES = 1024


@dataclass(frozen=True, slots=True)
class Filters:
    """Parameters of N rows on the device: temperature float32, top_k int64 (V where off), top_p float64, min_p
    float32, each [N, 1]. `num_candidates`: how many of a row's largest logits to look at first. `all_top_k`: every
    row has a top-k, so that nobody needs the weight of the whole vocabulary."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    num_candidates: int
    all_top_k: bool

    @classmethod
    def from_params(cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Filters:
        def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
        bounded = [k for k in top_k if k < vocab_size]
        wanted = 2 * max(bounded, default=0)  # twice: ties at the border are then seen, too
        if len(bounded) < len(params):
            wanted = max(wanted, _NUCLEUS_CANDIDATES)
        return cls(
            temperature=column([max(p.temperature, _MIN_TEMPERATURE) for p in params], torch.float32),
            top_k=column(top_k, torch.int64),
            top_p=column([p.top_p for p in params], torch.float64),
            min_p=column([p.min_p for p in params], torch.float32),
            num_candidates=min(wanted, vocab_size),
            all_top_k=len(bounded) == len(params),
        )

    def select(self, rows: torch.Tensor, num_candidates: int) -> Filters:
        """The same for some of the rows (int64 indices)."""
        columns = (self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows])
        return Filters(*columns, num_candidates, self.all_top_k)


def is_filtered(params: SamplingParams) -> bool:
    """Whether some filter may drop tokens; otherwise the whole vocabulary is drawn from."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def draw(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One token per row from the whole vocabulary.

    logits: float32 [N, V]. temperature: float32 [N, 1]. uniform: float64 [N] in [0, 1). Returns int64 [N].
    """
    return _pick(_weights(_relative(logits, temperature)), uniform)


def draw_filtered(logits: torch.Tensor, filters: Filters, uniform: torch.Tensor) -> torch.Tensor:
    """One token per row after top-k, top-p of what is left, and min-p. Shapes as in `draw`."""
    relative = _relative(logits, filters.temperature)
    values, ids = logits.topk(filters.num_candidates, dim=1)
    tokens, decided = _draw_candidates(relative, values, ids, filters, uniform)
    if filters.num_candidates < logits.shape[1] and not bool(decided.all()):
        rows = (~decided).nonzero()[:, 0]
        whole = filters.select(rows, logits.shape[1])
        values, ids = logits[rows].sort(dim=1, descending=True)
        tokens[rows] = _draw_candidates(relative[rows], values, ids, whole, uniform[rows])[0]
    return tokens


def _draw_candidates(
    relative: torch.Tensor, values: torch.Tensor, ids: torch.Tensor, filters: Filters, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N], and whether the candidates were enough to know them [N].

    relative: probabilities over the largest one [N, V]. values, ids: the C largest logits, descending, [N, C].
    """
    probs = relative.gather(1, ids)
    weights = _weights(probs)
    in_top_k = values >= values.gather(1, (filters.top_k - 1).clamp(max=values.shape[1] - 1))
    ties_cut = in_top_k[:, -1] & (filters.top_k < relative.shape[1])[:, 0]
    kept = in_top_k & _in_nucleus(relative, values, weights * in_top_k, filters) & (probs >= filters.min_p)
    # Nothing past the candidates matters when it has no weight, or when the last candidate is filtered out already.
    decided = (weights[:, -1] == 0) | ~(kept[:, -1] | ties_cut)
    in_vocabulary_order = ids.argsort(dim=1)
    picked = _pick((weights * kept).gather(1, in_vocabulary_order), uniform)
    return ids.gather(1, in_vocabulary_order.gather(1, picked[:, None]))[:, 0], decided


def _in_nucleus(relative: torch.Tensor, values: torch.Tensor, weights: torch.Tensor, filters: Filters) -> torch.Tensor:
    """bool [N, C]: the smallest head of the descending order that holds top_p of the weight, and its last one's ties.

    weights: of the candidates that top-k left, [N, C]; without top-k, the total is that of the whole vocabulary.
    """
    total = weights.sum(1, keepdim=True)
    if not filters.all_top_k:
        whole = _weights(relative).sum(1, keepdim=True)
        total = torch.where(filters.top_k < relative.shape[1], total, whole)
    reached = weights.cumsum(1) >= filters.top_p * total
    border = values.gather(1, reached.int().argmax(1, keepdim=True))  # argmax: the first True
    return (values >= border) | ~reached[:, -1:] | (filters.top_p == 1)


def _relative(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Probability over the probability of the likeliest token, after temperature: float32 [N, V], at most 1."""
    return ((logits - logits.amax(1, keepdim=True)) / temperature).exp_()


def _weights(probs: torch.Tensor) -> torch.Tensor:
    return (probs * _WEIGHT_ONE).to(torch.int64)


def _pick(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index of the first column whose inclusive running sum exceeds uniform * total. weights: int64 [N, C]."""
    sums = weights.cumsum(1)
    total = sums[:, -1:]
    target = (uniform[:, None] * total).to(torch.int64).clamp(max=total - 1)  # rounding must not reach the total
    return torch.searchsorted(sums, target, right=True)[:, 0]

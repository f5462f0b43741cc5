"""Filters and the draw: from float32 logits and one uniform number per row to one token per row.

N rows, V tokens in the vocabulary, C candidates (the largest logits of a row, in descending order).

The token depends on nothing but the row's own logits, parameters and uniform number:

* Probabilities are integers: floor(2**40 * exp((logit - max) / temperature)). Integer sums are exact, so no order of
  summation, batch size or device can move the border between two tokens. A token of weight 0 is never drawn.
* Every filter is a threshold on the logit: tokens that tie with the last kept one are all kept. Which of two equal
  logits a device sorts first therefore does not matter.
* The inverse of the cumulative distribution is taken in vocabulary order.

A row without a finite logit (a request that forbids every token, a broken model) gets some token of the vocabulary: it
must not end the run of the other rows.

Sorting the vocabulary is avoided: the filters first look at C candidates, and only rows that the candidates do not
decide (the nucleus reaches further) are sorted whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from max_ray.driver import upload
from max_ray.interfaces.request import SamplingParams

_WEIGHT_ONE = 2.0**40  # V * 2**40 stays below 2**63 for any vocabulary under 8 million tokens
# Positive and finite in float32: 0 / 0 and -inf / inf would be NaN. Beyond them nothing changes.
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-30, 1e30
_NUCLEUS_CANDIDATES = 1024
_CPU_SLICE = 2**18  # logits


@dataclass(frozen=True, slots=True)
class Filters:
    """Parameters of N rows on the device: temperature float32, top_k int64 (V where off), top_p float64, min_p
    float32, each [N, 1]. `num_candidates`: how many of a row's largest logits to look at first. `all_top_k`: every
    row has a top-k, so that no row needs the weight of the whole vocabulary."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    num_candidates: int
    all_top_k: bool

    @classmethod
    def from_params(cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Filters:
        def column(values: Sequence[float], dtype: type[np.generic]) -> torch.Tensor:
            return upload(np.array(values, dtype=dtype)[:, None], device)

        top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
        bounded = [k for k in top_k if k < vocab_size]
        wanted = 2 * max(bounded, default=0)  # twice: ties at the border are then seen, too
        if len(bounded) < len(params):
            wanted = max(wanted, _NUCLEUS_CANDIDATES)
        return cls(
            temperature=column(
                [min(max(p.temperature, _MIN_TEMPERATURE), _MAX_TEMPERATURE) for p in params], np.float32
            ),
            top_k=column(top_k, np.int64),
            top_p=column([p.top_p for p in params], np.float64),
            min_p=column([p.min_p for p in params], np.float32),
            num_candidates=min(wanted, vocab_size),
            all_top_k=len(bounded) == len(params),
        )

    def select(self, rows: torch.Tensor | slice) -> Filters:
        """The same for some of the rows."""
        columns = (self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows])
        return Filters(*columns, self.num_candidates, self.all_top_k)


def is_filtered(params: SamplingParams) -> bool:
    """Whether some filter may drop tokens; otherwise the whole vocabulary is drawn from."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def draw(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One token per row from the whole vocabulary.

    logits: float32 [N, V]. temperature: float32 [N, 1]. uniform: float64 [N] in [0, 1). Returns int64 [N].
    """
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for some in _slices(logits):
        largest = logits[some].amax(1, keepdim=True)
        tokens[some] = _pick(_weights(_relative(logits[some], largest, temperature[some])), uniform[some])
    return tokens


def draw_filtered(logits: torch.Tensor, filters: Filters, uniform: torch.Tensor) -> torch.Tensor:
    """One token per row after top-k, top-p of what is left, and min-p. Shapes as in `draw`."""
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for some in _slices(logits):
        tokens[some] = _draw_candidates(logits[some], filters.select(some), uniform[some])
    return tokens


def _slices(logits: torch.Tensor) -> list[slice]:
    """Rows to treat together: on a CPU few enough for temporaries to stay in its cache (2x measured)."""
    rows = max(1, _CPU_SLICE // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def _draw_candidates(logits: torch.Tensor, filters: Filters, uniform: torch.Tensor) -> torch.Tensor:
    """Looks at the candidates, and sorts only the rows that they do not decide."""
    values, ids = logits.topk(filters.num_candidates, dim=1)
    total = None if filters.all_top_k else _total(logits, filters.temperature)
    weights, kept, decided = _filter(values, total, logits.shape[1], filters)
    in_vocabulary_order = ids.argsort(dim=1)
    picked = _pick((weights * kept).gather(1, in_vocabulary_order), uniform)
    tokens = ids.gather(1, in_vocabulary_order.gather(1, picked[:, None]))[:, 0]
    if not bool(decided.all()):
        rows = (~decided).nonzero()[:, 0]
        some_total = None if total is None else total[rows]
        tokens[rows] = _draw_sorted(logits[rows], some_total, filters.select(rows), uniform[rows])
    return tokens


def _draw_sorted(
    logits: torch.Tensor, total: torch.Tensor | None, filters: Filters, uniform: torch.Tensor
) -> torch.Tensor:
    """The same by sorting the whole vocabulary."""
    values = _descending(logits)
    kept = logits >= _border(values, total, filters)
    weights = _weights(_relative(logits, values[:, :1], filters.temperature))
    return _pick(weights * kept, uniform)


def kept_by_filters(logits: torch.Tensor, filters: Filters) -> torch.Tensor:
    """bool [N, V]: the tokens that pass top-k, top-p and min-p. logits: float32 [N, V]."""
    total = None if filters.all_top_k else _total(logits, filters.temperature)
    return logits >= _border(_descending(logits), total, filters)


def weights_of(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """int64 [N, V]: what each token weighs in a draw; see the file header. Shapes as in `draw`."""
    return _weights(_relative(logits, logits.amax(1, keepdim=True), temperature))


def _border(values: torch.Tensor, total: torch.Tensor | None, filters: Filters) -> torch.Tensor:
    """float32 [N, 1]: the least logit that passes all filters. values: [N, V] in descending order."""
    _, kept, _ = _filter(values, total, values.shape[1], filters)
    return values.gather(1, (kept.sum(1, keepdim=True) - 1).clamp(min=0))


def _descending(logits: torch.Tensor) -> torch.Tensor:
    """Sorted values. On a CPU by numpy, whose vectorized sort without indices was 16 times as fast as torch's."""
    if logits.device.type != "cpu":
        return logits.sort(dim=1, descending=True).values
    ascending = np.sort(logits.numpy(), axis=1)
    return torch.from_numpy(ascending[:, ::-1].copy())


def _filter(
    values: torch.Tensor, total: torch.Tensor | None, vocab_size: int, filters: Filters
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which of the C largest logits, `values` [N, C] in descending order, pass all filters.

    total: int64 [N, 1], weight of the whole vocabulary; None when every row has a top-k.
    Returns weights int64 [N, C]; kept bool [N, C], always a head of the order with all ties; decided bool [N]: whether
    the candidates were enough to know.
    """
    probs = _relative(values, values[:, :1], filters.temperature)
    weights = _weights(probs)
    in_top_k = values >= values.gather(1, (filters.top_k - 1).clamp(max=values.shape[1] - 1))
    kept = in_top_k & _in_nucleus(values, weights * in_top_k, total, vocab_size, filters) & (probs >= filters.min_p)
    # Nothing past the candidates matters when it has no weight, or when the last candidate is filtered out already
    # (by a nucleus whose weight was not counted short: top-k may have lost ties past the last candidate).
    ties_cut = in_top_k[:, -1] & (filters.top_k < vocab_size)[:, 0]
    decided = (weights[:, -1] == 0) | ~(kept[:, -1] | ties_cut)
    return weights, kept, decided | (values.shape[1] == vocab_size)


def _in_nucleus(
    values: torch.Tensor, weights: torch.Tensor, total: torch.Tensor | None, vocab_size: int, filters: Filters
) -> torch.Tensor:
    """bool [N, C]: the shortest head of the order that holds top_p of the weight, and the ties of its last one.

    weights: of the candidates that top-k left, [N, C]; rows without top-k take `total` for the whole.
    """
    left = weights.sum(1, keepdim=True)
    if total is not None:
        left = torch.where(filters.top_k < vocab_size, left, total)
    reached = weights.cumsum(1) >= filters.top_p * left
    border = values.gather(1, reached.int().argmax(1, keepdim=True))  # argmax: the first True
    return (values >= border) | ~reached[:, -1:] | (filters.top_p == 1)


def _relative(logits: torch.Tensor, largest: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Probability over that of the likeliest token, after temperature: float32 of the shape of `logits`, at most 1."""
    return (logits - largest).div_(temperature).exp_()


def _total(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """int64 [N, 1]: weight of the whole vocabulary."""
    return weights_of(logits, temperature).sum(1, keepdim=True)


def _weights(probs: torch.Tensor) -> torch.Tensor:
    return (probs * _WEIGHT_ONE).to(torch.int64)


def _pick(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index of the first column whose inclusive running sum exceeds uniform * total. weights: int64 [N, C]."""
    sums = weights.cumsum(1)
    total = sums[:, -1:]
    target = (uniform[:, None] * total).to(torch.int64).clamp(max=total - 1)  # rounding must not reach the total
    return torch.searchsorted(sums, target, right=True)[:, 0].clamp(max=weights.shape[1] - 1)

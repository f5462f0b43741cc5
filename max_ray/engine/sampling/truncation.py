"""Truncation: typical-p and XTC, for the few rows that use them. Off the path of all other rows.

Such a row goes through top-k, top-p and min-p here too, since both filters look at what these leave. What remains is
drawn from by temperature alone. As in `draw.py`, weights are integers and every border is a value: which of two equal
logits comes first, and how many rows a batch has, do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from max_ray.driver import upload
from max_ray.engine.sampling.draw import Filters, kept_by_filters, weights_of
from max_ray.interfaces import LogitControls, SamplingParams


def truncates(params: SamplingParams) -> bool:
    """Whether a row's draws lose tokens to typical-p or XTC. Greedy rows draw nothing."""
    controls = params.logit_controls
    return controls is not None and controls.truncates and not params.is_greedy


def drawn_from_all(params: SamplingParams) -> SamplingParams:
    """The parameters with which a truncated row's token is drawn: the filters have done their work."""
    return replace(params, top_k=-1, top_p=1.0, min_p=0.0)


class Truncation:
    """The filters of N rows.

    Args:
        params: Of the rows.
        vocab_size: V.
        device: Where the logits are.
    """

    def __init__(self, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> None:
        def column(value: Callable[[LogitControls], float]) -> torch.Tensor:
            values = [value(p.logit_controls) for p in params if p.logit_controls is not None]
            return upload(np.array(values, dtype=np.float64)[:, None], device)

        self._filters = Filters.from_params(params, vocab_size, device)
        self._typical_p = column(lambda c: c.typical_p)
        self._xtc_probability = column(lambda c: c.xtc_probability if c.uses_xtc else 0.0)
        self._xtc_threshold = column(lambda c: c.xtc_threshold)

    def __call__(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """A copy in which removed tokens are -inf.

        Args:
            logits: float32 [N, V].
            uniform: float64 [N] in [0, 1), for XTC; not the number that draws the token.
        """
        kept = kept_by_filters(logits, self._filters)
        weights = weights_of(logits, self._filters.temperature)
        kept &= self._is_typical(weights * kept)
        kept &= ~self._is_excluded(logits, weights * kept, uniform[:, None])
        return logits.masked_fill(~kept, -torch.inf)

    def _is_typical(self, weights: torch.Tensor) -> torch.Tensor:
        """bool [N, V]. The entropy is rounded to float32, so that the order of its sum does not matter."""
        total = weights.sum(1, keepdim=True)
        probs = weights.double() / total.clamp(min=1)
        information = torch.where(weights > 0, -probs.log(), 0.0)
        entropy = (probs * information).sum(1, keepdim=True).float()
        distance = torch.where(weights > 0, (information.float() - entropy).abs(), torch.inf)
        ordered, order = distance.sort(dim=1)
        reached = weights.gather(1, order).cumsum(1) >= self._typical_p * total
        border = ordered.gather(1, reached.int().argmax(1, keepdim=True))  # argmax: the first True
        return (distance <= border) | (self._typical_p == 1)

    def _is_excluded(self, logits: torch.Tensor, weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """bool [N, V]: tokens of at least the threshold, but for the least likely of them."""
        total = weights.sum(1, keepdim=True)
        is_top = (weights >= self._xtc_threshold * total) & (weights > 0)
        least = torch.where(is_top, logits, torch.inf).amin(1, keepdim=True)
        return is_top & (logits > least) & (uniform < self._xtc_probability)

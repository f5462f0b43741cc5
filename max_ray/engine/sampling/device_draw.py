"""Draws on the device: the tokens of a batch in one launch, with nothing that the host has to wait for.

The kernel is `max_ray/kernels/gpu/sampling.py`, which follows `draw.py` to the letter, so that a request draws the same
tokens on either way. Everything it needs lies on the device from the first step on: the rows' parameters, their seeds,
and how many tokens each has drawn, which is counted there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from max_ray import kernels
from max_ray.driver import upload
from max_ray.engine.sampling.draw import Filters
from max_ray.interfaces.request import SamplingParams

SamplingKernel = Callable[..., torch.Tensor]
"""(logits [N, V], temperature, top_k, top_p, min_p, seeds, counters, each [N] or [N, 1]) -> tokens int64 [N]."""


def sampling_kernel(device: torch.device) -> SamplingKernel | None:
    """The kernel that draws on this device; None where torch's own operations have to."""
    if (device.type != "cuda" and not kernels.is_interpreted()) or find_spec("triton") is None:
        return None
    return cast(SamplingKernel, import_module("max_ray.kernels.gpu.sampling").sample)


class DeviceDraw:
    """The draws of one batch, step after step. Greedy rows take the likeliest token; ties go to the lowest id.

    counters: int64 [N], tokens each row has generated before the first call.
    """

    def __init__(
        self,
        kernel: SamplingKernel,
        params: Sequence[SamplingParams],
        counters: npt.NDArray[np.int64],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        drawn = np.flatnonzero([not p.is_greedy for p in params])
        self._kernel = kernel
        self._num_rows = len(params)
        self._drawn = upload(drawn, device)
        self._greedy = upload(np.setdiff1d(np.arange(len(params)), drawn), device)
        chosen = [params[i] for i in drawn.tolist()]
        filters = Filters.from_params(chosen, vocab_size, device)
        self._columns = (filters.temperature, filters.top_k, filters.top_p, filters.min_p)
        seeds = np.array([p.seed % 2**64 for p in chosen], dtype=np.uint64).view(np.int64)
        self._seeds = upload(seeds, device)
        self._counters = upload(counters[drawn], device)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [N, V] of any float type -> int64 [N]; one call a step."""
        rows = logits if len(self._greedy) == 0 else logits.index_select(0, self._drawn)
        tokens = self._kernel(rows, *self._columns, self._seeds, self._counters)
        self._counters += 1
        if len(self._greedy) == 0:
            return tokens
        merged = torch.empty(self._num_rows, dtype=torch.int64, device=logits.device)
        merged.index_copy_(0, self._drawn, tokens)
        return merged.index_copy_(0, self._greedy, logits.index_select(0, self._greedy).argmax(1))

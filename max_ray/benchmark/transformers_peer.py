"""`transformers` on the same shape: a static cache and, on a GPU, a decode step compiled with `torch.compile` into a
CUDA graph. The loop is the shortest that there is: nothing is read on the host before the last step.

(Its own `generate` makes a new cache for each call, and a compiled step would have to be recorded for it anew.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import StaticCache

from max_ray.benchmark.synthetic import transformers_model
from max_ray.benchmark.timing import synchronize

_WARM_STEPS = 6  # the first compiles, the next ones record


class TransformersPeer:
    """One model with random weights. compiled: the decode step (default: on GPUs)."""

    def __init__(
        self, config: dict[str, Any], dtype: torch.dtype, device: torch.device, compiled: bool | None = None
    ) -> None:
        self._model = transformers_model(config, dtype, device)
        self._vocab_size = config["vocab_size"]
        self._device = device
        self._compiled = device.type == "cuda" if compiled is None else compiled

    @torch.no_grad()
    def decode_tokens_per_s(self, rows: int, context: int, steps: int) -> float:
        """Tokens a second of all rows together, greedy, behind prompts of `context` tokens."""
        cache = StaticCache(config=self._model.config, max_cache_len=context + _WARM_STEPS + 3 * steps)
        token = self._next(self._model.forward, self._prompts(rows, context), cache)
        forward = self._decode_forward()
        for _ in range(_WARM_STEPS):
            token = self._next(forward, token, cache)
        best = float("inf")
        for _ in range(3):
            synchronize(self._device)
            start = time.perf_counter()
            for _ in range(steps):
                token = self._next(forward, token, cache)
            synchronize(self._device)
            best = min(best, time.perf_counter() - start)
        return rows * steps / best

    @torch.no_grad()
    def prefill_tokens_per_s(self, tokens: int) -> float:
        """Of one prompt, its first token included; not compiled, as `generate` does it."""
        prompts, best = self._prompts(1, tokens), float("inf")
        for _ in range(4):  # the first warms up
            cache = StaticCache(config=self._model.config, max_cache_len=tokens)
            synchronize(self._device)
            start = time.perf_counter()
            self._next(self._model.forward, prompts, cache)
            synchronize(self._device)
            best = min(best, time.perf_counter() - start)
        return tokens / best

    def _decode_forward(self) -> Callable[..., Any]:
        if not self._compiled:
            forward: Callable[..., Any] = self._model.forward
            return forward
        torch.compiler.reset()  # else a second batch size would be compiled for any size
        return torch.compile(self._model.forward, mode="reduce-overhead", fullgraph=True)

    def _next(self, forward: Callable[..., Any], tokens: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        """int64 [rows, 1]: the likeliest tokens behind `tokens` [rows, n]."""
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        logits = forward(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        likeliest: torch.Tensor = logits[:, -1:].argmax(-1)
        return likeliest

    def _prompts(self, rows: int, tokens: int) -> torch.Tensor:
        return torch.randint(5, self._vocab_size, (rows, tokens), device=self._device)

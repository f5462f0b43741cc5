"""`transformers` on the same shape: its own `generate` with a static cache, which compiles the decode step on a GPU.

Decode time is the difference between generating 1 + steps tokens and generating one, so that the prompt does not count.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from max_ray.benchmark.synthetic import transformers_model
from max_ray.benchmark.timing import synchronize


class TransformersPeer:
    """One model with random weights. The first call for a batch size compiles; it is not timed."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        self._model = transformers_model(config, dtype, device)
        self._vocab_size = config["vocab_size"]
        self._device = device

    def decode_tokens_per_s(self, rows: int, context: int, steps: int) -> float:
        """Tokens a second of all rows together, behind prompts of `context` tokens."""
        prompts = self._prompts(rows, context)
        if self._device.type == "cuda":
            torch.compiler.reset()  # else a new batch size would be compiled for any size
        for _ in range(2):  # compiles, then records
            self._generate(prompts, 1 + steps)
        long = min(self._generate(prompts, 1 + steps) for _ in range(2))
        short = min(self._generate(prompts, 1) for _ in range(2))
        return rows * steps / max(long - short, 1e-9)

    def prefill_tokens_per_s(self, tokens: int) -> float:
        """Of one prompt, its first token included."""
        prompts = self._prompts(1, tokens)
        self._generate(prompts, 1)
        return tokens / min(self._generate(prompts, 1) for _ in range(3))

    def _prompts(self, rows: int, tokens: int) -> torch.Tensor:
        return torch.randint(5, self._vocab_size, (rows, tokens), device=self._device)

    def _generate(self, prompts: torch.Tensor, new_tokens: int) -> float:
        """Seconds for so many new tokens a row."""
        synchronize(self._device)
        start = time.perf_counter()
        self._model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation="static",
        )
        synchronize(self._device)
        return time.perf_counter() - start

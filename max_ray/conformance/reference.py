"""What a family is held against: Hugging Face's own network in float32, each sequence alone, no cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from max_ray.errors import ConfigError

Reference = Callable[[Sequence[Sequence[int]]], list[torch.Tensor]]
"""Sequences of token ids -> the float32 logits [length, vocabulary] of each."""


def huggingface_reference(path: Path, dtype: torch.dtype = torch.float32) -> Reference:
    """The model of a folder, as `transformers` computes it with plain ("eager") attention; of one that sees images,
    what it makes of texts. Raises ConfigError where it knows no such model."""
    try:
        model = _load(path, dtype)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"transformers cannot load {path} as a causal language model, so there is nothing to compare with "
            f"({error}). A family of one's own may bring a function reference_logits(path, sequences) beside its "
            f"ARCHITECTURES."
        ) from error
    model.eval()

    def logits_of(sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [model(torch.tensor([list(s)]), use_cache=False).logits[0].float() for s in sequences]

    return logits_of


def _load(path: Path, dtype: torch.dtype) -> Any:
    """Raises ValueError and KeyError of the first attempt."""
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    try:
        return AutoModelForCausalLM.from_pretrained(path, **options)
    except (ValueError, KeyError) as error:
        try:
            return AutoModelForImageTextToText.from_pretrained(path, **options)
        except (ValueError, KeyError):
            raise error from None

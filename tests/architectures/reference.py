"""Hugging Face's answers, and the comparison with ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tests.architectures.engine import Engine
from tests.checkpoints import load_reference


def reference_logits(
    path: Path, sequences: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Hugging Face, each sequence alone in one forward pass: [length, vocabulary] each."""
    model = load_reference(path, dtype)
    with torch.no_grad():
        return [model(torch.tensor([list(sequence)])).logits[0] for sequence in sequences]


def assert_parity(
    path: Path, engine: Engine, sequences: Sequence[Sequence[int]], chunks: Sequence[Sequence[int]], atol: float = 1e-4
) -> None:
    ours = engine.logits_of(sequences, chunks)
    for mine, theirs in zip(ours, reference_logits(path, sequences), strict=True):
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=0)

"""Families other than Llama from GGUF files, laid out as llama.cpp's converter does it, against Hugging Face."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from max_ray.conformance.engine import random_tokens
from max_ray.conformance.reference import huggingface_reference
from tests.gguf_families import KINDS, convert, logits_of, tiny

_NAMES = [name for name in KINDS if name not in ("Llama 3", "Mistral")]


@pytest.mark.parametrize("name", _NAMES)
def test_logits_equal_hugging_face(name: str, tmp_path: Path) -> None:
    folder = tiny(name, tmp_path / "hf")
    sequences = random_tokens([19, 6], 160)
    convert(name, folder, tmp_path / "f32.gguf")
    ours = logits_of(tmp_path / "f32.gguf", sequences)
    for mine, theirs in zip(ours, huggingface_reference(folder)(sequences), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", _NAMES)
def test_quantized_weights_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    convert(name, tiny(name, tmp_path / "hf"), tmp_path / "q.gguf", "Q8_0")
    sequences = random_tokens([19], 160)
    kept = logits_of(tmp_path / "q.gguf", sequences)[0]
    torch.testing.assert_close(
        kept, logits_of(tmp_path / "q.gguf", sequences, keep_quantized=False)[0], atol=2e-4, rtol=0
    )

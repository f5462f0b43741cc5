"""What checkpoints saved years ago carry beside the weights."""

from __future__ import annotations

from importlib import import_module

import pytest

from max_ray.huggingface import HuggingFaceConfig


@pytest.mark.parametrize("family", ["llama3", "qwen", "mistral", "mixtral", "gemma3", "qwen3_moe"])
def test_frequencies_of_the_rope_are_computed_not_read(family: str) -> None:
    names = import_module(f"architectures.{family}.weight_adapters").safetensors_name_map(HuggingFaceConfig({}))
    name = "model.layers.11.self_attn.rotary_emb.inv_freq"
    assert name in names.rename([name]).dropped

"""Values of config.json that change numbers, each against `transformers` in float32: one forward pass a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from max_ray.config import PipelineConfig
from max_ray.conformance.engine import Engine, random_tokens
from max_ray.conformance.reference import huggingface_reference
from max_ray.conformance.suite import Suite
from max_ray.distributed import TPGroup
from max_ray.huggingface import load_huggingface_config
from max_ray.interfaces import SupportedEncoding
from max_ray.nn.activation import ACTIVATIONS as ACTIVATION_NAMES
from max_ray.nn.activation import gated
from max_ray.pipelines import resolve_plan
from max_ray.registry import PIPELINE_REGISTRY
from tests.architectures.adapter_models import make_adapter_checkpoint
from tests.architectures.families import find_tiny, make_tiny

ACTIVATIONS: list[tuple[str, str]] = [
    ("Llama 3", "gelu"),
    ("Llama 3", "relu"),
    ("Llama 3", "swish"),
    ("Qwen2", "gelu_pytorch_tanh"),
    ("Qwen3", "gelu_new"),
    ("Mistral", "gelu"),
    ("Ministral", "relu"),
    ("Gemma 3", "gelu"),
    ("Mixtral", "gelu"),
    ("Qwen3 MoE, some layers dense", "relu"),
    ("DeepSeek V2", "gelu"),
    ("DeepSeek V3", "gelu_pytorch_tanh"),
]


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.8, 2.0, 2.5],
    "long_factor": [1.0, 1.4, 2.0, 3.0, 4.0, 5.0, 7.0, 9.0],
    "original_max_position_embeddings": 32,
}


def check(name: str, folder: Path, lengths: list[int], **overrides: Any) -> None:
    """The logits of whole prompts are those of `transformers` for the tiny model with these overrides."""
    model = find_tiny(name)
    make_tiny(replace(model, overrides={**model.overrides, **overrides}), folder)
    record = PIPELINE_REGISTRY.retrieve_architecture(load_huggingface_config(folder))
    suite = Suite(record, folder, huggingface_reference(folder))
    sequences = random_tokens(lengths, 160)
    ours = Engine(suite.load(TPGroup.single(), SupportedEncoding.float32)).logits_of(sequences, [[n] for n in lengths])
    for mine, theirs in zip(ours, suite.reference(sequences), strict=True):
        torch.testing.assert_close(mine, theirs, atol=3e-4, rtol=0)


@pytest.mark.parametrize(("name", "activation"), ACTIVATIONS)
def test_activations(name: str, activation: str, tmp_path: Path) -> None:
    key = "hidden_activation" if name.startswith("Gemma") else "hidden_act"
    check(name, tmp_path, [19, 6], **{key: activation})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(ACTIVATION_NAMES))
def test_a_row_alone_has_the_bits_of_a_row_among_others(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 2 * 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    together = gated(name)(x)
    assert all(torch.equal(gated(name)(x[i : i + 1])[0], together[i]) for i in range(5))


@pytest.mark.parametrize(
    "name", ["Llama 3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Qwen3", "Mistral"))]
)
@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.4}, {"factor": 2.0}])
def test_longrope(name: str, more: dict[str, float], tmp_path: Path) -> None:
    check(name, tmp_path, [60, 32, 33], rope_parameters={**LONGROPE, **more})


@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_longrope_of_a_network_of_transformers(partial: float, tmp_path: Path) -> None:
    """Rows on both sides of the length of the pre-training in one batch, whole and in chunks, as each alone."""
    rope = {**LONGROPE, "partial_rotary_factor": partial}
    kept = int(8 * partial)
    rope |= {name: rope[name][:kept] for name in ("short_factor", "long_factor")}
    options = {"original_max_position_embeddings": 32, "head_dim": 16, "hidden_size": 64}
    folder = make_adapter_checkpoint("Phi3ForCausalLM", tmp_path, rope_parameters=rope, **options)
    settings = PipelineConfig(model_path=str(folder), devices="cpu")
    plan = resolve_plan(settings)
    assert (plan.max_length, plan.config.enable_prefix_caching) == (128, False)
    assert resolve_plan(settings.replace(max_length=32)).config.enable_prefix_caching
    lengths = [60, 32, 33, 9]
    sequences = random_tokens(lengths, 160)
    expected = huggingface_reference(folder)(sequences)
    record = PIPELINE_REGISTRY.retrieve_architecture(load_huggingface_config(folder))
    suite = Suite(record, folder, lambda _: [])
    for chunks in ([[60], [32], [33], [9]], [[20, 30, 10], [0, 31, 1], [8, 24, 1], [9]]):
        ours = Engine(suite.load(TPGroup.single(), SupportedEncoding.float32)).logits_of(sequences, chunks)
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=3e-4, rtol=0)

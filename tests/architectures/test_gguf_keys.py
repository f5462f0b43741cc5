"""Keys of GGUF files that change numbers: read, as `transformers` computes the equivalent config.json; or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from max_ray.config import PipelineConfig
from max_ray.conformance.engine import random_tokens
from max_ray.conformance.reference import huggingface_reference
from max_ray.errors import ConfigError, WeightsError
from max_ray.huggingface import load_huggingface_config
from max_ray.pipelines import resolve_plan
from tests.gguf_families import convert, keys_of, logits_of, tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10_000.0}
DENSE = ["Llama 3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Qwen2", "Qwen3"))]
LENGTHS = [60, 9]


def check(name: str, tmp_path: Path, keys: dict[str, Any] | None = None, **overrides: Any) -> None:
    """The file's logits are those of `transformers` for the checkpoint with these overrides."""
    folder = tiny(name, tmp_path / "hf", **overrides)
    sequences = random_tokens(LENGTHS, 160)
    ours = logits_of(convert(name, folder, tmp_path / "f32.gguf", keys=keys), sequences)
    for mine, theirs in zip(ours, huggingface_reference(folder)(sequences), strict=True):
        torch.testing.assert_close(mine, theirs, atol=3e-4, rtol=0)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(
    "numbers", [{}, {"beta_fast": 8.0, "beta_slow": 2.0}, {"attention_factor": 1.0}, {"attention_factor": 1.7}]
)
def test_yarn(name: str, numbers: dict[str, float], tmp_path: Path) -> None:
    overrides = {"head_dim": 16, "rope_parameters": {**YARN, **numbers}}
    check(name, tmp_path, **overrides)


def test_a_general_attention_factor_multiplies_that_of_yarn(tmp_path: Path) -> None:
    """`rope.scaling.attn_factor` is llama.cpp's own: what yarn's logarithm gives is multiplied by it."""
    rope = {**YARN, "attention_factor": 1.5 * 1.1386294361}
    check("Llama 3", tmp_path, {"rope.scaling.yarn_attn_factor": None, "rope.scaling.attn_factor": 1.5},
          rope_parameters=rope)  # fmt: skip


def test_a_general_attention_factor_alone(tmp_path: Path) -> None:
    """cos and sin times m, of queries and of keys: that is a score times m * m, and a yarn that stretches nothing."""
    rope = {**YARN, "factor": 1.0, "attention_factor": 1.3}
    keys = {key: None for key in keys_of(json.loads(_config(tmp_path, rope))) if key.startswith("rope.scaling")}
    check("Llama 3", tmp_path, {**keys, "rope.scaling.attn_factor": 1.3}, rope_parameters=rope)


def _config(tmp_path: Path, rope: dict[str, Any]) -> str:
    return (tiny("Llama 3", tmp_path / "config", rope_parameters=rope) / "config.json").read_text()


@pytest.mark.parametrize("keys", [
    {"rope.scaling.type": None},
    {"rope.scaling.type": None, "rope.scaling.factor": None, "rope.scale_linear": 4.0},
])  # fmt: skip
def test_a_factor_without_a_type_is_linear(keys: dict[str, Any], tmp_path: Path) -> None:
    check("Qwen3", tmp_path, {**keys, "context_length": 512},
          rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0})  # fmt: skip


def test_a_factor_of_the_type_none_counts_nothing(tmp_path: Path) -> None:
    check("Qwen3", tmp_path, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0})


@pytest.mark.parametrize("pattern", [None, 3, [True, False, True, True, False, True, False]])
def test_gemmas_local_rope_soft_cap_and_layers(pattern: Any, tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"]
    flags = pattern if isinstance(pattern, list) else [(layer + 1) % (pattern or 6) != 0 for layer in range(7)]
    check(
        "Gemma 3",
        tmp_path,
        {"attention.sliding_window_pattern": pattern, "final_logit_softcapping": 3.0},
        final_logit_softcapping=3.0,
        layer_types=[kinds[flag] for flag in flags],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50_000.0},
        },
    )


@pytest.mark.parametrize("name", ["Mistral", "Mixtral"])
def test_a_sliding_window_is_mistrals(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, {"attention.sliding_window": 11}, sliding_window=11)


def test_weights_of_experts_that_do_not_sum_to_one(tmp_path: Path) -> None:
    check("Qwen3 MoE", tmp_path, {"expert_weights_norm": False}, norm_topk_prob=False)


def test_biases_of_llamas_feed_forward(tmp_path: Path) -> None:
    check("Llama 3", tmp_path, mlp_bias=True)


REFUSED: list[tuple[str, str, Any]] = [
    ("Llama 3", "rope.dimension_count", 8),
    ("Qwen3", "rope.dimension_count", 8),
    ("Gemma 3", "rope.dimension_count_swa", 8),
    ("Llama 3", "rope.dimension_sections", [4, 2, 2, 0]),
    ("Llama 3", "rope.scaling.alpha", 1000.0),
    ("Llama 3", "rope.freq_base_swa", 77.0),
    ("Llama 3", "rope.scaling.something_new", 2.0),
    ("Qwen2", "attention.sliding_window", 5),
    ("Qwen2", "attention.causal", False),
    ("Qwen3", "attention.scale", 0.5),
    ("Qwen3", "attention.value_length", 8),
    ("Llama 3", "attention.clamp_kqv", 8.0),
    ("Llama 3", "attention.max_alibi_bias", 8.0),
    ("Llama 3", "attention.temperature_scale", 0.1),
    ("Llama 3", "attention.indexer.top_k", 64),
    ("Llama 3", "attn_logit_softcapping", 50.0),
    ("Llama 3", "final_logit_softcapping", 30.0),
    ("Llama 3", "logit_scale", 0.25),
    ("Llama 3", "residual_scale", 0.22),
    ("Llama 3", "embedding_scale", 12.0),
    ("Qwen3", "full_attention_interval", 4),
    ("Mixtral", "expert_weights_norm", False),
    ("Mixtral", "expert_feed_forward_length", 17),
    ("Qwen3 MoE", "expert_gating_func", 2),
    ("Qwen3 MoE", "expert_weights_scale", 2.5),
    ("Qwen3 MoE", "expert_shared_count", 1),
    ("Qwen3 MoE", "expert_group_count", 4),
    ("DeepSeek V3", "expert_gating_func", 3),
    ("DeepSeek V3", "attention.scale", 0.5),
    ("DeepSeek V3", "attention.indexer.head_count", 4),
    ("DeepSeek V3", "attention.temperature_scale", 0.1),
    ("DeepSeek V3", "rope.dimension_count", 40),
    ("Qwen3 MoE", "leading_dense_block_count", 1),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("hf")
    return {name: tiny(name, place / name) for name in {name for name, _, _ in REFUSED}}


@pytest.mark.parametrize(("name", "key", "value"), REFUSED)
def test_a_key_that_the_family_cannot_follow_is_named(
    name: str, key: str, value: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    path = convert(name, folders[name], tmp_path / "m.gguf", keys={key: value})
    with pytest.raises(WeightsError, match=rf"m\.gguf: key \w+\.{key.replace('.', '[.]')} "):
        resolve_plan(PipelineConfig(model_path=str(path), devices="cpu"))


@pytest.mark.parametrize(("key", "value"), [("yarn_log_multiplier", 0.1), ("yarn_ext_factor", 0.5)])
def test_a_number_of_yarn_that_it_cannot_follow(
    key: str, value: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, f"rope.scaling.{key}": value}
    path = convert("Llama 3", folders["Llama 3"], tmp_path / "m.gguf", keys=yarn)
    with pytest.raises(WeightsError, match=f"key llama.rope.scaling.{key}"):
        resolve_plan(PipelineConfig(model_path=str(path), devices="cpu"))
    harmless = convert("Llama 3", folders["Llama 3"], tmp_path / "l.gguf", keys={f"rope.scaling.{key}": value})
    assert resolve_plan(PipelineConfig(model_path=str(harmless), devices="cpu")).max_length == 128


NEUTRAL: dict[str, Any] = {
    "rope.scaling.finetuned": True,
    "rope.scaling.alpha": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.original_context_length": 64,
    "rope.dimension_sections": [0, 0, 0, 0],
    "rope.freq_base_swa": 10_000.0,
    "attention.causal": True,
    "attention.scale": 0.25,
    "attention.sliding_window": 128,
    "attention.clamp_kqv": 0.0,
    "attention.temperature_length": 8192,
    "attention.layer_norm_epsilon": 1e-5,
    "logit_scale": 1.0,
    "attn_logit_softcapping": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_weights_scale": 2.5,
    "vocab_size": 160,
    "pooling_type": 3,
    "unheard_of": 5,
}


@pytest.mark.parametrize("name", ["Llama 3", "Qwen3"])
def test_keys_that_change_nothing_pass(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    path = convert(name, folders[name], tmp_path / "m.gguf", keys=NEUTRAL)
    assert load_huggingface_config(path).get("rope_scaling") is None
    assert resolve_plan(PipelineConfig(model_path=str(path), devices="cpu")).max_length == 128


def test_gemma_from_gguf_has_its_whole_context(tmp_path: Path) -> None:
    """`context_length` is the length of both ropes; only the global one is stretched."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
    }
    folder = tiny("Gemma 3", tmp_path / "hf", rope_parameters=rope)
    path = convert("Gemma 3", folder, tmp_path / "f32.gguf")
    plans = [PipelineConfig(model_path=str(place), devices="cpu") for place in (folder, path)]
    assert [resolve_plan(plan).max_length for plan in plans] == [128, 128]
    assert resolve_plan(plans[1].replace(max_length=100)).max_length == 100
    with pytest.raises(ConfigError, match="exceeds what the model supports: 128 tokens"):
        resolve_plan(plans[1].replace(max_length=129))

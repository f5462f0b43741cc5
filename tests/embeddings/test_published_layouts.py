"""Embedders as they are published: class names without a head, tokens that see later ones, two dense stages."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from architectures.gte.model_config import GteConfig
from max_ray.config import PipelineConfig
from max_ray.errors import ConfigError
from max_ray.huggingface import HuggingFaceConfig
from max_ray.interfaces import PipelineTask
from max_ray.nn.rope import RotaryEmbedding
from max_ray.pipelines import resolve_plan
from tests.embeddings.checkpoints import make_encoder, random_rows, reference_hidden, reference_vectors, write_json
from tests.embeddings.in_process import embed_in_process
from tests.embeddings.parity import LIMIT


def changed(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("roberta", "RobertaModel"),
        ("roberta with a head", "RobertaForMaskedLM"),
        ("camembert", "CamembertModel"),
        ("distilbert", "DistilBertModel"),
        ("distilbert with a head", "DistilBertForMaskedLM"),
        ("nomic_bert", "NomicBertModel"),
        ("gte", "GteModel"),
        ("gte with a head", "GteForMaskedLM"),
        ("jina_v3", "JinaEmbeddingsV3Model"),
        ("jina_v3 with a head", "JinaEmbeddingsV3ForMaskedLM"),
        ("e5-mistral", "MistralModel"),
        ("embedding gemma", "Gemma3TextModel"),
        ("gte-qwen2", "Qwen2ForCausalLM"),
        ("qwen2 without a head", "Qwen2Model"),
    ],
)
def test_the_published_class_name_is_an_embedder(name: str, published: str, tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", name)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [published]
    plan = resolve_plan(PipelineConfig(model_path=str(folder)))
    assert (plan.task, plan.num_blocks) == (PipelineTask.EMBEDDINGS_GENERATION, 0)


@pytest.mark.parametrize(
    ("name", "sees_later"), [("gte-qwen2", True), ("embedding gemma", True), ("e5-mistral", False)]
)
def test_the_first_token_sees_the_last_or_does_not(name: str, sees_later: bool, tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", name, pooling="cls")
    row = random_rows([9])[0]
    first, second = embed_in_process(folder, [row, [*row[:-1], row[-1] ^ 1]])
    assert (np.abs(first - second).max() > 1e-3) == sees_later


def test_a_window_of_an_embedder_that_sees_both_ways(tmp_path: Path) -> None:
    """Half of it lies on either side: of 3 layers two reach 4 tokens far, and the third is left out here."""
    folder = make_encoder(
        tmp_path / "model", "embedding gemma", pooling="cls", num_hidden_layers=2, layer_types=["sliding_attention"] * 2
    )
    row = random_rows([12])[0]
    rows = [row, *([*row[:i], row[i] ^ 1, *row[i + 1 :]] for i in (8, 9))]
    same, within, beyond = embed_in_process(folder, rows)
    assert np.abs(same - within).max() > 1e-5
    np.testing.assert_allclose(same, beyond, atol=1e-6)
    assert np.abs(same - reference_vectors(folder, rows, "embedding gemma", "cls")[0]).max() < LIMIT


def test_two_dense_stages_without_bias(tmp_path: Path) -> None:
    """As EmbeddingGemma has them."""
    folder = make_encoder(tmp_path / "model", "embedding gemma", normalize=False)
    stages = json.loads((folder / "modules.json").read_text())
    generator = torch.Generator().manual_seed(3)
    for path, size_in, size_out in (("2_Dense", 32, 48), ("3_Dense", 48, 10)):
        stages.append({"idx": 0, "name": "", "path": path, "type": "sentence_transformers.models.Dense"})
        identity = "torch.nn.modules.linear.Identity"
        numbers = {"in_features": size_in, "out_features": size_out, "bias": False, "activation_function": identity}
        write_json(folder / path / "config.json", numbers)
        weight = torch.randn(size_out, size_in, generator=generator)
        save_file({"linear.weight": weight}, folder / path / "model.safetensors")
    write_json(folder / "modules.json", stages)
    first, second = (load_file(folder / p / "model.safetensors")["linear.weight"] for p in ("2_Dense", "3_Dense"))
    rows = random_rows([4, 9])
    expected = [
        (second @ (first @ hidden.mean(0))).numpy() for hidden in reference_hidden(folder, rows, "embedding gemma")
    ]
    assert resolve_plan(PipelineConfig(model_path=str(folder))).embedding_size == 10
    np.testing.assert_allclose(embed_in_process(folder, rows), np.stack(expected), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "changes", "settings", "sentence"),
    [
        (
            "gte-qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
            {},
            "is_causal=false together with a sliding window",
        ),
        ("gte-qwen2", {}, {"task": "text_generation"}, "is_causal=false"),
        ("e5-mistral", {"is_causal": False}, {}, "is_causal=false"),
        ("embedding gemma", {}, {"task": "text_generation"}, "use_bidirectional_attention=True"),
        ("nomic_bert", {"rotary_scaling_factor": 2}, {}, "rotary_scaling_factor=2"),
        ("nomic_bert", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {}, "rope_type 'dynamic'"),
        ("gte", {"pack_qkv": False}, {}, "pack_qkv=False"),
        ("gte", {"position_embedding_type": "absolute"}, {}, "position_embedding_type='absolute'"),
        ("gte", {"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.6}}, {}, "mixed_b"),
        ("gte", {}, {"tensor_parallel_size": 2}, "one device only"),
        ("jina_v3", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {}, "rope_type 'dynamic'"),
        ("jina_v3", {"architectures": ["XLMRobertaModel"]}, {"tensor_parallel_size": 2}, "one device only"),
        ("distilbert", {"activation": "mish"}, {}, "activation='mish'"),
        ("roberta", {"is_decoder": True}, {}, "describes a decoder"),
    ],
)
def test_what_is_not_supported_is_said(
    name: str, changes: dict[str, object], settings: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    folder = changed(make_encoder(tmp_path / "model", name), **changes)
    with pytest.raises(ConfigError, match=sentence):
        resolve_plan(PipelineConfig.model_validate({"model_path": str(folder), **settings}))


def test_nomic_under_the_names_of_its_published_code(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "nomic_bert", pooling="mean")
    rows = random_rows([4, 64])
    expected = reference_vectors(folder, rows, "nomic_bert")
    config = json.loads((folder / "config.json").read_text())
    published = {
        **{"architectures": ["NomicBertModel"], "model_type": "nomic_bert", "n_embd": 32, "n_head": 4, "n_layer": 3},
        **{"n_inner": 48, "layer_norm_epsilon": 1e-12, "activation_function": "swiglu", "rotary_emb_base": 1000},
        **{"rotary_emb_fraction": 1.0, "rotary_scaling_factor": None, "qkv_proj_bias": False, "prenorm": False},
        **{"n_positions": 8192, "max_trained_positions": 64, "type_vocab_size": 2, "causal": False},
    }
    write_json(folder / "config.json", {**published, "vocab_size": config["vocab_size"]})
    assert np.abs(embed_in_process(folder, rows) - expected).max() < LIMIT
    assert resolve_plan(PipelineConfig(model_path=str(folder))).max_length == 64


def published_gte(folder: Path, name: str, **changes: object) -> Path:
    """The checkpoint under the names of the code that published ones come with."""
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("rope_parameters", "transformers_version")}
    published = {
        **{"architectures": [name], "model_type": "new", "position_embedding_type": "rope", "pack_qkv": True},
        **{"layer_norm_type": "layer_norm", "logn_attention_scale": False, "logn_attention_clip1": False},
        **{
            "unpad_inputs": False,
            "use_memory_efficient_attention": False,
            "auto_map": {"AutoModel": "modeling.NewModel"},
        },
    }
    write_json(folder / "config.json", {**kept, **published, **changes})
    return folder


@pytest.mark.parametrize("name", ["NewModel", "NewForMaskedLM"])
def test_gte_under_the_names_of_its_published_code(name: str, tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "gte", rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    rows = random_rows([4, 64, 1])
    expected = reference_vectors(folder, rows, "gte")
    prefixed = {f"new.{key}": value for key, value in load_file(folder / "model.safetensors").items()}
    save_file(prefixed, folder / "model.safetensors", metadata={"format": "pt"})
    published_gte(folder, name, rope_theta=500_000)
    assert resolve_plan(PipelineConfig(model_path=str(folder))).architecture == "GteModel"
    assert np.abs(embed_in_process(folder, rows) - expected).max() < LIMIT


def test_the_published_ntk_rope_of_gte(tmp_path: Path) -> None:
    """It divides each frequency of a base that is `factor` times larger by factor^(2 / head_dim)."""
    factor, theta, head_dim = 8.0, 20_000.0, 8
    published = {"type": "ntk", "factor": factor}
    config = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 9, "intermediate_size": 8}
    config |= {"num_hidden_layers": 1, "max_position_embeddings": 64, "rope_theta": theta, "rope_scaling": published}
    rope = RotaryEmbedding(GteConfig.from_huggingface(HuggingFaceConfig(config)).rope, 64, dtype=torch.float32)
    powers = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angles = torch.arange(64, dtype=torch.float64)[:, None] / (theta * factor) ** powers / factor ** (2 / head_dim)
    cos, _ = rope(torch.arange(64)).chunk(2, dim=-1)
    torch.testing.assert_close(cos.double(), angles.cos(), atol=1e-5, rtol=0)
    linear = {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / head_dim)}
    folder = make_encoder(tmp_path / "model", "gte", rope_parameters=linear)
    rows = random_rows([4, 64])
    expected = reference_vectors(folder, rows, "gte")
    published_gte(folder, "NewModel", rope_theta=theta, rope_scaling=published)
    assert np.abs(embed_in_process(folder, rows) - expected).max() < LIMIT
    published_gte(folder, "NewModel", rope_theta=theta, rope_scaling=None)
    assert np.abs(embed_in_process(folder, rows) - expected).max() > 1e-3


def wrapped_in_adapters(folder: Path) -> None:
    """The checkpoint as jina-embeddings-v3 has it: every matrix but the norms with adapters for two tasks."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.dim() < 2 or "pooler" in name:
            tensors[f"roberta.{name}"] = tensor
            continue
        wrapped = f"roberta.{name.removesuffix('.weight')}.parametrizations.weight"
        tensors[f"{wrapped}.original"] = tensor
        tensors[f"{wrapped}.0.lora_A"] = torch.ones(2, 4, tensor.shape[1])
        tensors[f"{wrapped}.0.lora_B"] = torch.ones(2, tensor.shape[0], 4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["XLMRobertaModel", "XLMRobertaLoRA"])
def test_jina_v3_as_published(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a task the published code applies no adapter."""
    folder = make_encoder(tmp_path / "model", "jina_v3")
    rows = random_rows([4, 64, 1])
    expected = reference_vectors(folder, rows, "jina_v3")
    wrapped_in_adapters(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    published = {
        **{"architectures": [name], "model_type": "xlm-roberta", "position_embedding_type": "rotary"},
        **{"rotary_emb_base": 20000.0, "use_flash_attn": True, "lora_rank": 4, "lora_alpha": 1},
        **{"lora_adaptations": ["retrieval.query", "text-matching"], "auto_map": {"AutoModel": "m.XLMRobertaLoRA"}},
    }
    write_json(folder / "config.json", {**config, **published})
    with caplog.at_level(logging.WARNING, logger="max_ray"):
        vectors = embed_in_process(folder, rows)
    assert np.abs(vectors - expected).max() < LIMIT
    assert "adapters for tasks (LoRA) are not applied" in caplog.text

"""config.json with names of base classes, of pre-training heads, of somebody's own code, or with none: the family that
runs it, and what it computes, against `transformers`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from max_ray.config import PipelineConfig
from max_ray.conformance.engine import Engine, random_tokens
from max_ray.conformance.reference import huggingface_reference
from max_ray.conformance.suite import Suite
from max_ray.distributed import TPGroup
from max_ray.errors import ArchitectureNotFoundError, ConfigError
from max_ray.huggingface import HuggingFaceConfig, load_huggingface_config
from max_ray.interfaces import PipelineTask, SupportedEncoding
from max_ray.pipelines import resolve_plan
from max_ray.registry import PIPELINE_REGISTRY
from tests.architectures.adapter_models import make_adapter_checkpoint
from tests.architectures.families import find_tiny, make_tiny
from tests.embeddings.checkpoints import make_encoder, random_rows, reference_vectors
from tests.embeddings.in_process import embed_in_process


def change(folder: Path, **values: Any) -> Path:
    """config.json with other values; None takes one out."""
    config = {**json.loads((folder / "config.json").read_text()), **values}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def rename(folder: Path, new_name: Callable[[str], str | None]) -> Path:
    """The checkpoint's tensors under other names; None takes one out."""
    weights = {new_name(name): w for name, w in load_file(folder / "model.safetensors").items()}
    kept = {name: w for name, w in weights.items() if name is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def bare(name: str) -> str:
    return name.removeprefix("model.")


def logits_of(folder: Path, sequences: list[list[int]]) -> list[torch.Tensor]:
    record = PIPELINE_REGISTRY.retrieve_architecture(load_huggingface_config(folder))
    model = Suite(record, folder, lambda _: []).load(TPGroup.single(), SupportedEncoding.float32)
    return Engine(model).logits_of(sequences, [[len(s)] for s in sequences])


DECODERS = [
    ("Llama 3", "LlamaModel"),
    ("Qwen2", "Qwen2Model"),
    ("Qwen3", "Qwen3Model"),
    ("Mistral", "MistralModel"),
    ("Gemma 3", "Gemma3TextModel"),
    ("Mixtral", "MixtralModel"),
    ("Qwen3 MoE", "Qwen3MoeModel"),
    ("gpt-oss", "GptOssModel"),
    ("DeepSeek V3", "DeepseekV3Model"),
]


@pytest.mark.parametrize(("name", "base"), DECODERS)
@pytest.mark.parametrize(
    "new_name", [pytest.param(str, marks=pytest.mark.slow), bare], ids=["whole names", "bare names"]
)
def test_a_decoder_by_its_base_class(name: str, base: str, new_name: Callable[[str], str], tmp_path: Path) -> None:
    folder, sequences = make_tiny(find_tiny(name), tmp_path), random_tokens([9], 160)
    expected = huggingface_reference(folder)(sequences)[0]
    rename(change(folder, architectures=[base]), new_name)
    torch.testing.assert_close(logits_of(folder, sequences)[0], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("architectures", [None, []])
def test_none_at_all(architectures: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, sequences = make_tiny(find_tiny("Qwen3"), tmp_path), random_tokens([9], 160)
    expected = huggingface_reference(folder)(sequences)[0]
    change(folder, architectures=architectures)
    with caplog.at_level(logging.INFO, logger="max_ray"):
        ours = logits_of(folder, sequences)[0]
    torch.testing.assert_close(ours, expected, atol=3e-4, rtol=0)
    assert "names no architectures, which for model_type 'qwen3' is Qwen3ForCausalLM of transformers" in caplog.text


def test_a_base_class_without_a_model_type(tmp_path: Path) -> None:
    folder = change(make_tiny(find_tiny("Qwen3"), tmp_path), architectures=["Qwen3Model"], model_type=None)
    assert resolve_plan(PipelineConfig(model_path=str(folder), devices="cpu")).architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize("new_name", [str, bare], ids=["whole names", "bare names"])
def test_the_adapter_by_a_base_class(new_name: Callable[[str], str], tmp_path: Path) -> None:
    folder, sequences = make_adapter_checkpoint("Phi3ForCausalLM", tmp_path), random_tokens([9], 160)
    expected = huggingface_reference(folder)(sequences)[0]
    rename(change(folder, architectures=["Phi3Model"]), new_name)
    torch.testing.assert_close(logits_of(folder, sequences)[0], expected, atol=3e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "masked"),
    [("bert", "BertForMaskedLM"), ("bert", "BertForPreTraining"), ("xlm_roberta", "XLMRobertaForMaskedLM"),
     ("modern_bert", "ModernBertForMaskedLM"), ("bert", None), ("mpnet", None), ("modern_bert", None),
     ("qwen3", "Qwen3Model"), ("qwen3 without a head", "Qwen3Model")],
)  # fmt: skip
def test_an_embedder_by_another_name(name: str, masked: str | None, tmp_path: Path) -> None:
    folder, rows = make_encoder(tmp_path, name), random_rows([7, 3])
    expected = reference_vectors(folder, rows, name)
    change(folder, architectures=masked and [masked])
    assert np.abs(embed_in_process(folder, rows) - expected).max() < 1e-4


def test_a_decoder_without_a_head_in_sentence_files_is_no_writer(tmp_path: Path) -> None:
    folder = change(make_encoder(tmp_path, "qwen3"), architectures=["MixtralModel"], model_type="mixtral")
    with pytest.raises(ArchitectureNotFoundError, match="MixtralModel is known for text_generation, but not for emb"):
        resolve_plan(PipelineConfig(model_path=str(folder), devices="cpu"))


@pytest.mark.parametrize("biases", [False, True])
def test_internlm3_is_a_llama(biases: bool, tmp_path: Path) -> None:
    model = find_tiny("Llama 3")
    model = replace(model, overrides={"attention_bias": biases, "mlp_bias": biases, "rms_norm_eps": 1e-5})
    folder, sequences = make_tiny(model, tmp_path), random_tokens([9], 160)
    names = {"attention_bias": None, "mlp_bias": None, "rms_norm_eps": None, "qkv_bias": biases, "bias": biases}
    change(
        folder, architectures=["InternLM3ForCausalLM"], model_type="internlm3", auto_map={"AutoModel": "x.Y"}, **names
    )
    expected = huggingface_reference(folder)(sequences)[0]
    torch.testing.assert_close(logits_of(folder, sequences)[0], expected, atol=3e-4, rtol=0)


def published_minicpm(folder: Path, **changes: Any) -> dict[str, float]:
    """Turns a Llama's config.json into one of a MiniCPM with the same shapes. Gives its scales."""
    scales = {"scale_emb": 3, "scale_depth": 1.4, "dim_model_base": 16}
    names = {"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "auto_map": {"AutoModel": "m.MiniCPM"}}
    change(folder, **names, **scales, mup_denominator=32, sparse_config=None, **changes)
    return scales


@pytest.mark.parametrize("tied", [False, True])
def test_minicpm_is_a_llama_with_scaled_weights(tied: bool, tmp_path: Path) -> None:
    model = find_tiny("Llama 3")
    model = replace(model, overrides={**model.overrides, "tie_word_embeddings": tied})
    folder, scaled = make_tiny(model, tmp_path / "minicpm"), make_tiny(model, tmp_path / "scaled")
    values = json.loads((folder / "config.json").read_text())
    scales = published_minicpm(folder)
    added = scales["scale_depth"] / values["num_hidden_layers"] ** 0.5
    weights = load_file(scaled / "model.safetensors")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    weights["lm_head.weight"] = head / (values["hidden_size"] / scales["dim_model_base"])
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * scales["scale_emb"]
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = weights[name] * added
    save_file(weights, scaled / "model.safetensors", metadata={"format": "pt"})
    change(scaled, tie_word_embeddings=False)
    sequences = random_tokens([9], 160)
    expected = huggingface_reference(scaled)(sequences)[0]
    torch.testing.assert_close(logits_of(folder, sequences)[0], expected, atol=3e-4, rtol=0)
    change(folder, scale_emb=1)
    assert (logits_of(folder, sequences)[0] - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "sentence"), [({"num_experts": 8}, "num_experts=8"), ({"sparse_config": {"topk": 64}}, "sparse_config")]
)
def test_what_minicpm_has_besides_is_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = make_tiny(find_tiny("Llama 3"), tmp_path)
    published_minicpm(folder)
    change(folder, **changes)
    with pytest.raises(ConfigError, match=sentence):
        resolve_plan(PipelineConfig(model_path=str(folder), devices="cpu"))


@pytest.mark.parametrize(
    ("name", "model_type", "theirs"),
    [
        ("Step3p5ForCausalLM", "step3p5", "Step3p7ForConditionalGeneration"),
    ],
)
def test_the_native_class_is_named_where_no_family_has_it(name: str, model_type: str, theirs: str) -> None:
    config = HuggingFaceConfig({"architectures": [name], "model_type": model_type, "auto_map": {"AutoModel": "m.X"}})
    with pytest.raises(ArchitectureNotFoundError) as caught:
        PIPELINE_REGISTRY.retrieve_architecture(config)
    said = str(caught.value)
    assert f"names {name}, which for model_type '{model_type}' is {theirs} of transformers" in said
    assert "code that comes with the checkpoint (auto_map) is not run. No family here runs it." in said


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaForCausalLMEagle", "Qwen3Model"])
@pytest.mark.parametrize("task", list(PipelineTask))
def test_other_heads_and_unknown_classes_stay_unknown(name: str, task: PipelineTask) -> None:
    config = HuggingFaceConfig({"architectures": [name], "model_type": "llama"})
    with pytest.raises(ArchitectureNotFoundError, match=f"No architecture {name} is known"):
        PIPELINE_REGISTRY.retrieve_architecture(config, task)
    assert PIPELINE_REGISTRY.tasks_of(config) == frozenset()

"""Families other than Llama from GGUF files, laid out as llama.cpp's converter does it, against Hugging Face."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.constants import MODEL_ARCH
from gguf.constants import GGMLQuantizationType as Type
from safetensors.torch import load_file

from max_ray.config import PipelineConfig
from max_ray.conformance.engine import Engine, random_tokens
from max_ray.conformance.reference import huggingface_reference
from max_ray.distributed import TPGroup
from max_ray.huggingface import load_huggingface_config
from max_ray.interfaces import WeightsFormat
from max_ray.registry import PIPELINE_REGISTRY
from max_ray.weights import open_weights
from tests.architectures.families import find_tiny, make_tiny
from tests.gguf_files import encoded, reordered

_SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
_KINDS = {
    "Qwen2": ("qwen2", MODEL_ARCH.QWEN2, {}),
    "Qwen3": ("qwen3", MODEL_ARCH.QWEN3, {}),
    "Gemma 3": ("gemma3", MODEL_ARCH.GEMMA3, {"query_pre_attn_scalar": 16, "num_hidden_layers": 7}),
    "Mixtral": ("llama", MODEL_ARCH.LLAMA, {"sliding_window": None}),
    "Qwen3 MoE": ("qwen3moe", MODEL_ARCH.QWEN3MOE, {"moe_intermediate_size": 32}),
}
_EXPERT = re.compile(r"(?P<layer>model\.layers\.\d+\..*experts)\.\d+\.(?P<which>\w+)\.weight")


@dataclass(frozen=True)
class Float32Activations:
    cache_dtype: str = "float32"


def tiny(name: str, folder: Path) -> Path:
    model = find_tiny(name)
    keep = {k: v for k, v in model.overrides.items() if k not in ("layer_types", "rope_parameters", "head_dim")}
    return make_tiny(replace(model, overrides={**keep, **_SIZES, **_KINDS[name][2]}), folder)


def convert(name: str, folder: Path, path: Path, kind: str) -> None:
    """Writes the checkpoint in `folder` as llama.cpp's converter does: names, stacked experts, order of rows, norms."""
    arch, tensors_of, _ = _KINDS[name]
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, arch)
    _write_keys(writer, config)
    names = gguf.get_tensor_name_map(tensors_of, config["num_hidden_layers"])
    for theirs, tensor in _stacked(load_file(folder / "model.safetensors")).items():
        own = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert own is not None, theirs
        data = tensor.float()
        if arch == "llama":
            data = reordered(data, own, config)
        if arch == "gemma3" and own.endswith("norm.weight"):
            data = data + 1
        stored = kind if data.dim() > 1 and "gate_inp" not in own else "F32"
        writer.add_tensor(own, encoded(data.contiguous(), stored), raw_dtype=Type[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of a layer as one tensor, under the name that the converter gives them."""
    result: dict[str, torch.Tensor] = {}
    stacks: dict[str, list[torch.Tensor]] = {}
    for name in sorted(tensors, key=lambda n: [int(p) if p.isdigit() else 0 for p in n.split(".")]):
        match = _EXPERT.fullmatch(name)
        if match is None:
            result[name] = tensors[name]
        else:
            stacks.setdefault(f"{match['layer']}.{match['which']}.weight", []).append(tensors[name])
    return result | {name: torch.stack(experts) for name, experts in stacks.items()}


def _write_keys(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base((rope.get("full_attention") or rope).get("rope_theta", 10_000.0))
    if config.get("sliding_window") and "layer_types" in config and config["model_type"] == "gemma3_text":
        writer.add_sliding_window(config["sliding_window"])
    num_experts = config.get("num_experts") or config.get("num_local_experts")
    if num_experts:
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def logits_of(path: Path, sequences: list[list[int]], keep_quantized: bool) -> list[torch.Tensor]:
    config = load_huggingface_config(path)
    record = PIPELINE_REGISTRY.retrieve_architecture(config)
    adapter, tp = record.weight_adapters[WeightsFormat.gguf], TPGroup.single()
    source = open_weights(path, keep_quantized=keep_quantized)
    settings = PipelineConfig(model_path=str(path))
    kind: Any = record.pipeline_model
    model = kind(settings, config, Float32Activations(), tp.device, tp, source, adapter)
    return Engine(model).logits_of(sequences, [[len(s)] for s in sequences])


@pytest.mark.parametrize("name", list(_KINDS))
def test_logits_equal_hugging_face(name: str, tmp_path: Path) -> None:
    folder = tiny(name, tmp_path / "hf")
    sequences = random_tokens([19, 6], 160)
    convert(name, folder, tmp_path / "f32.gguf", "F32")
    ours = logits_of(tmp_path / "f32.gguf", sequences, keep_quantized=True)
    for mine, theirs in zip(ours, huggingface_reference(folder)(sequences), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", list(_KINDS))
def test_quantized_weights_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    convert(name, tiny(name, tmp_path / "hf"), tmp_path / "q.gguf", "Q8_0")
    sequences = random_tokens([19], 160)
    kept = logits_of(tmp_path / "q.gguf", sequences, keep_quantized=True)[0]
    torch.testing.assert_close(
        kept, logits_of(tmp_path / "q.gguf", sequences, keep_quantized=False)[0], atol=2e-4, rtol=0
    )

"""GGUF files of every family that can be read from one, laid out as llama.cpp's converter does it, and their logits.

`tiny(kind, folder, **overrides)` writes the Hugging Face checkpoint, `convert` the file with the same weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.constants import MODEL_ARCH
from gguf.constants import GGMLQuantizationType as Type
from safetensors.torch import load_file

from max_ray.config import PipelineConfig
from max_ray.conformance.engine import Engine
from max_ray.distributed import TPGroup
from max_ray.huggingface import load_huggingface_config
from max_ray.interfaces import WeightsFormat
from max_ray.registry import PIPELINE_REGISTRY
from max_ray.weights import open_weights
from tests.architectures.families import find_tiny, make_tiny
from tests.gguf_files import encoded, reordered

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
_LATENT = {
    "head_dim": 8, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10_000.0,
        "mscale": 0.7, "mscale_all_dim": 0.7,
    },
}  # fmt: skip
_OSS_ROPE = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False,
    "beta_fast": 32.0, "beta_slow": 1.0, "rope_theta": 10_000.0,
}  # fmt: skip
KINDS: dict[str, tuple[str, MODEL_ARCH, dict[str, Any]]] = {
    "Llama 3": ("llama", MODEL_ARCH.LLAMA, {}),
    "Qwen2": ("qwen2", MODEL_ARCH.QWEN2, {}),
    "Qwen3": ("qwen3", MODEL_ARCH.QWEN3, {}),
    "Gemma 3": ("gemma3", MODEL_ARCH.GEMMA3, {"query_pre_attn_scalar": 16, "num_hidden_layers": 7}),
    "Mixtral": ("llama", MODEL_ARCH.LLAMA, {"sliding_window": None}),
    "Mistral": ("llama", MODEL_ARCH.LLAMA, {}),
    "DeepSeek V2": ("deepseek2", MODEL_ARCH.DEEPSEEK2, _LATENT),
    "DeepSeek V2 Lite": ("deepseek2", MODEL_ARCH.DEEPSEEK2, {**_LATENT, "q_lora_rank": None, "attention_bias": False}),
    "DeepSeek V3": ("deepseek2", MODEL_ARCH.DEEPSEEK2, {**_LATENT, "norm_topk_prob": True}),
    "gpt-oss": ("gpt-oss", MODEL_ARCH.GPT_OSS, {"rope_parameters": _OSS_ROPE, "swiglu_limit": 7.0}),
    "Qwen3 MoE": ("qwen3moe", MODEL_ARCH.QWEN3MOE, {"moe_intermediate_size": 32}),
}
_EXPERT = re.compile(r"(?P<layer>model\.layers\.\d+\..*experts)\.\d+\.(?P<which>\w+)\.weight")
_YARN = {
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "original_max_position_embeddings": "original_context_length",
}
_SUFFIXES = (".weight", ".bias")
Keys = dict[str, Any]


@dataclass(frozen=True)
class Float32Activations:
    cache_dtype: str = "float32"


def tiny(name: str, folder: Path, **overrides: Any) -> Path:
    model = find_tiny(name)
    keep = {k: v for k, v in model.overrides.items() if k not in ("layer_types", "rope_parameters", "head_dim")}
    return make_tiny(replace(model, overrides={**keep, **SIZES, **KINDS[name][2], **overrides}), folder)


def convert(
    name: str, folder: Path, path: Path, kind: str = "F32", keys: Keys | None = None, halves: bool = True
) -> Path:
    """Writes the checkpoint in `folder` as llama.cpp's converter does: names, stacked experts, order of rows, norms.
    keys: others than the converter would write; None leaves one out. halves: whether the up-projections of latent
    attention are cut in two, as they are since 2025."""
    arch, tensors_of, _ = KINDS[name]
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**keys_of(config), **(keys or {})}.items():
        _add(writer, f"{arch}.{key}", value)
    names = gguf.get_tensor_name_map(tensors_of, config["num_hidden_layers"])
    tensors = _stacked(load_file(folder / "model.safetensors"))
    if arch == "gpt-oss":
        tensors = _experts_of_oss(tensors)
    for theirs, tensor in (_halved(tensors, config) if halves else tensors).items():
        own = names.get_name(theirs.replace("e_score_correction_bias", "e_score_correction.bias"), _SUFFIXES)
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
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        writer.add_string(key, value)


def keys_of(config: dict[str, Any]) -> Keys:
    """The keys that the converter writes for a config.json, without the architecture's name."""
    keys: Keys = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if "kv_lora_rank" in config:
        return keys | dict(_latent_keys(config)) | dict(_rope_keys(config.get("rope_parameters") or {}))
    keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim, "rope.dimension_count": head_dim}
    if config["model_type"] in ("gemma3_text", "gpt_oss"):
        keys["attention.sliding_window"] = config["sliding_window"]
    num_experts = config.get("num_experts") or config.get("num_local_experts")
    if num_experts:
        keys |= {"expert_count": num_experts, "expert_used_count": config["num_experts_per_tok"]}
    if config["model_type"] == "gpt_oss":
        keys["expert_feed_forward_length"] = config["intermediate_size"]
    if "moe_intermediate_size" in config:
        keys["expert_feed_forward_length"] = config["moe_intermediate_size"]
    return keys | dict(_rope_keys(config.get("rope_parameters") or {}))


def _rope_keys(rope: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    local = (rope.get("sliding_attention") or {}).get("rope_theta")
    if local is not None:
        yield "rope.freq_base_swa", float(local)
    rope = rope.get("full_attention") or rope
    yield "rope.freq_base", float(rope.get("rope_theta", 10_000.0))
    if rope.get("rope_type") not in ("linear", "yarn"):
        return
    yield "rope.scaling.type", rope["rope_type"]
    yield "rope.scaling.factor", float(rope["factor"])
    for theirs, own in _YARN.items():
        if theirs in rope:
            yield f"rope.scaling.{own}", int(rope[theirs]) if "context" in own else float(rope[theirs])


def _latent_keys(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Of DeepSeek: MLA counts as one key head, as wide as what is cached."""
    rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    is_v3, rope = config["model_type"] == "deepseek_v3", config.get("rope_parameters") or {}
    yield from {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": config["v_head_dim"],
        "attention.kv_lora_rank": rank,
        "attention.q_lora_rank": config["q_lora_rank"],
        "rope.dimension_count": rotated,
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": bool(config.get("norm_topk_prob")),
        "expert_gating_func": 2 if is_v3 else 1,
        "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"] if "mscale_all_dim" in rope else None,
    }.items()
    if is_v3 or config.get("topk_method") == "group_limited_greedy":
        yield "expert_group_count", config["n_group"]
        yield "expert_group_used_count", config["topk_group"]


def _experts_of_oss(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gate and up columns apart, matrices transposed, biases named as such."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stem, is_bias = name.removesuffix("_bias"), name.endswith("_bias")
        kind = "bias" if is_bias else "weight"
        if stem.endswith("experts.gate_up_proj"):
            for i, which in enumerate(("gate_proj", "up_proj")):
                part = tensor[..., i::2]
                result[f"{stem.removesuffix('gate_up_proj')}{which}.{kind}"] = part if is_bias else part.transpose(1, 2)
        elif stem.endswith("experts.down_proj"):
            result[f"{stem}.{kind}"] = tensor if is_bias else tensor.transpose(1, 2)
        else:
            result[f"{name}.weight" if name.endswith("sinks") else name] = tensor
    return result


def _halved(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """kv_b_proj as k_b_proj, transposed, and v_b_proj, a matrix for each head."""
    result = {name: tensor for name, tensor in tensors.items() if "kv_b_proj" not in name}
    for name, tensor in tensors.items():
        if "kv_b_proj" in name:
            by_head = tensor.unflatten(0, (config["num_attention_heads"], -1))
            keys, values = by_head.split([config["qk_nope_head_dim"], config["v_head_dim"]], dim=1)
            result[name.replace("kv_b_proj", "k_b_proj")] = keys.transpose(1, 2)
            result[name.replace("kv_b_proj", "v_b_proj")] = values
    return result


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


def logits_of(path: Path, sequences: list[list[int]], keep_quantized: bool = True) -> list[torch.Tensor]:
    config = load_huggingface_config(path)
    record = PIPELINE_REGISTRY.retrieve_architecture(config)
    adapter, tp = record.weight_adapters[WeightsFormat.gguf], TPGroup.single()
    source = open_weights(path, keep_quantized=keep_quantized)
    settings = PipelineConfig(model_path=str(path))
    kind: Any = record.pipeline_model
    model = kind(settings, config, Float32Activations(), tp.device, tp, source, adapter)
    return Engine(model).logits_of(sequences, [[len(s)] for s in sequences])

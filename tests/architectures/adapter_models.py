"""A tiny random checkpoint of any causal language model of the installed `transformers`: what the adapter is held
against. Sizes are set by the usual names of configuration fields; what a class needs beside them is in OVERRIDES."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SIZES: dict[int | float, tuple[str, ...]] = {
    160: ("vocab_size",),
    32: ("hidden_size", "n_embd", "d_model", "embed_dim", "dim", "embedding_size", "word_embed_proj_dim"),
    64: ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "d_ff", "shared_intermediate_size"),
    3: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    2: ("num_key_value_heads", "num_experts_per_tok", "moe_topk", "moe_k", "num_kv_heads"),
    16: ("head_dim", "moe_intermediate_size", "expert_dim", "shared_expert_intermediate_size"),
    128: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    8: ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "qk_rope_head_dim"),
    24: ("kv_lora_rank",),
    20: ("q_lora_rank",),
    12: ("qk_nope_head_dim",),
    10: ("v_head_dim",),
    11: ("sliding_window",),
    1: ("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace", "bos_token_id"),
    0: ("pad_token_id",),
}
EOS = 159
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "block_types")

OVERRIDES: dict[str, dict[str, Any]] = {}


def causal_classes() -> list[str]:
    """Every class name that `transformers` lists for causal language models, once each, in alphabetical order."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()), key=str.lower)


def tiny_adapter_config(class_name: str, **changes: Any) -> Any:
    """A small configuration of the class: usual fields, then OVERRIDES, then `changes`."""
    model_type = next(t for t, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name == class_name)
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    known = {*default.to_dict(), *getattr(config_class, "attribute_map", {})}
    values: dict[str, Any] = {}
    for size, names in SIZES.items():
        for name in names:
            mapped = getattr(config_class, "attribute_map", {}).get(name, name)
            if mapped in known and isinstance(getattr(default, mapped, None) or 0, int):
                values.setdefault(mapped, size)
    if "eos_token_id" in known:
        values["eos_token_id"] = EOS
    values.update({"tie_word_embeddings": default.to_dict().get("tie_word_embeddings", False)})
    return config_class(**{**values, **OVERRIDES.get(class_name, {}), **changes})


def make_adapter_checkpoint(class_name: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Writes config.json and model.safetensors of a tiny model into `directory`."""
    config = tiny_adapter_config(class_name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = getattr(transformers, class_name)(config).float().eval()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                _randomize(name, parameter)
    network.save_pretrained(directory)
    return directory


def _randomize(name: str, parameter: torch.Tensor) -> None:
    """Weights large enough that logits differ clearly between tokens; norm weights and biases are not trivial."""
    if "norm" in name or "ln_" in name or parameter.dim() == 1 and "bias" not in name:
        parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
    elif name.endswith("bias") or parameter.dim() == 1:
        parameter.normal_(0.0, 0.1)
    elif name.endswith(("gate.weight", "router.weight", "router.layer.weight")):
        parameter.normal_(0.0, 5.0 / parameter.shape[-1] ** 0.5)  # sharp: rounding rarely changes the choice
    else:
        parameter.normal_(0.0, 1.0 / parameter.shape[-1] ** 0.5)

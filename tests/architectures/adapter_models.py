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

OF_SEVERAL_NETWORKS = "a network of several (images, audio, or others)"
_PLAIN_PARTS = {"attn_config", "ffn_config"}

OVERRIDES: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "CohereForCausalLM": {"logit_scale": 1.0},
    "Cohere2ForCausalLM": {"logit_scale": 1.0},
    "Cohere2MoeForCausalLM": {"logit_scale": 1.0},
    "CohereCompassForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0, "mrope_section": [2, 1, 1]},
        },
    },
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "Gemma3nForCausalLM": {
        "intermediate_size": 64,
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 160,
        "hidden_size_per_layer_input": 8, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZambaForCausalLM": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    "Zamba2ForCausalLM": {
        "layer_types": ["mamba", "hybrid", "mamba"], "n_mamba_heads": 4, "num_mem_blocks": 1, "mamba_headdim": 16,
    },
    "FalconH1ForCausalLM": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local", "global"], 1]]},
    "GraniteMoeHybridForCausalLM": {
        "mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention", "mamba"],
    },
    "HeliumForCausalLM": {"head_dim": 8},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention", "conv"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention", "conv"]},
    "LongcatFlashForCausalLM": {"num_layers": 2, "num_hidden_layers": 4},
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "ReformerModelWithLMHead": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}  # fmt: skip


def causal_classes() -> list[str]:
    """Every class name that `transformers` lists for causal language models, once each, in alphabetical order."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()), key=str.lower)


def config_class_of(class_name: str) -> Any:
    """The configuration class; of a text model's own where it shares its class with a larger one."""
    types = [t for t, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name == class_name]
    return CONFIG_MAPPING[next((t for t in types if t.endswith("_text")), types[0])]


def is_composite(class_name: str) -> bool:
    """Whether the class is made of several networks, so that no tiny checkpoint of it is tried."""
    return bool(set(config_class_of(class_name).sub_configs) - _PLAIN_PARTS)


def tiny_adapter_config(class_name: str, **changes: Any) -> Any:
    """A small configuration of the class: usual fields, then OVERRIDES, then `changes`."""
    return tiny_config(config_class_of(class_name), **{**OVERRIDES.get(class_name, {}), **changes})


def tiny_config(config_class: Any, **changes: Any) -> Any:
    """A small configuration: usual fields, then `changes`."""
    attribute_map = getattr(config_class, "attribute_map", {})
    default = config_class().to_dict()
    values: dict[str, Any] = {}
    for size, names in SIZES.items():
        for name in names:
            mapped = attribute_map.get(name, name)
            if mapped in default and not isinstance(default[mapped], (list, dict, bool, str)):
                values.setdefault(mapped, size)
    if default.get("kv_lora_rank"):
        values |= {"head_dim": 8, "num_key_value_heads": 4}
    if "rotary_dim" in default:
        values["rotary_dim"] = 4
    if "is_decoder" in default:
        values["is_decoder"] = True
    return config_class(**{**values, "eos_token_id": EOS, **changes})


def make_adapter_checkpoint(class_name: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Writes config.json and model.safetensors of a tiny model into `directory`."""
    config = tiny_adapter_config(class_name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = getattr(transformers, class_name)(config).float().eval()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                randomize(name, parameter)
            for module in network.modules():  # as training leaves it; some networks of transformers zero it anew
                if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                    module.weight[module.padding_idx] = 0.0
    network.save_pretrained(directory)
    return directory


def randomize(name: str, parameter: torch.Tensor) -> None:
    """Weights large enough that logits differ clearly between tokens; norm weights and biases are not trivial."""
    if "norm" in name or "ln_" in name or (parameter.dim() == 1 and "bias" not in name):
        parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
    elif name.endswith("bias") or parameter.dim() == 1:
        parameter.normal_(0.0, 0.1)
    elif name.endswith(("gate.weight", "router.weight", "router.layer.weight")):
        parameter.normal_(0.0, 5.0 / parameter.shape[-1] ** 0.5)  # sharp: rounding rarely changes the choice
    else:
        parameter.normal_(0.0, 1.0 / parameter.shape[-1] ** 0.5)

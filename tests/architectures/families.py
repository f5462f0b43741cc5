"""The table of tiny random checkpoints, some for each family: what the parity test runs, and the parity table shows.

Sizes are small and awkward: windows shorter than the prompts, heads wider than hidden / heads, few KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10_000.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
}


@dataclass(frozen=True)
class TinyModel:
    """A class of transformers and what its configuration is given beside COMMON.

    routed: a mixture of experts (see Suite). norms_around: the middle of the random norm weights.
    """

    name: str
    class_name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    routed: bool = False
    norms_around: float = 1.0


TINY_MODELS = [
    TinyModel("Llama 3", "LlamaForCausalLM"),
    TinyModel("Qwen2", "Qwen2ForCausalLM", {"head_dim": 8}),
    TinyModel("Qwen2, sliding window, tied", "Qwen2ForCausalLM", {
        "head_dim": 8, "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1,
        "tie_word_embeddings": True,
    }),
    TinyModel("Qwen3", "Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    TinyModel("Qwen3, biases, one KV head", "Qwen3ForCausalLM", {"attention_bias": True, "num_key_value_heads": 1}),
    TinyModel("Mistral", "MistralForCausalLM", {"sliding_window": 11}),
    TinyModel("Mistral, no window", "MistralForCausalLM", {"sliding_window": None}),
    TinyModel("Ministral", "MinistralForCausalLM", {
        "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    }),
    TinyModel("Gemma 3", "Gemma3ForCausalLM", {
        "num_hidden_layers": 4, "sliding_window": 7, "query_pre_attn_scalar": 24, "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
        },
    }, norms_around=0.0),
    TinyModel("Gemma 3, biases, soft cap, untied", "Gemma3ForCausalLM", {
        "sliding_window": 9, "attention_bias": True, "final_logit_softcapping": 3.0, "num_key_value_heads": 1,
    }, norms_around=0.0),
    TinyModel("Mixtral", "MixtralForCausalLM", {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 13,
    }, routed=True),
    TinyModel("Qwen3 MoE", "Qwen3MoeForCausalLM", {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True,
    }, routed=True),
    TinyModel("Qwen3 MoE, some layers dense", "Qwen3MoeForCausalLM", {
        "num_hidden_layers": 4, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [1], "attention_bias": True,
    }, routed=True),
    TinyModel("DeepSeek V2", "DeepseekV2ForCausalLM", {
        **LATENT, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.0,
    }, routed=True),
    TinyModel("DeepSeek V2 Lite", "DeepseekV2ForCausalLM", {
        **LATENT, "q_lora_rank": None, "topk_method": "greedy", "attention_bias": True,
    }, routed=True),
    TinyModel("DeepSeek V3", "DeepseekV3ForCausalLM", {**LATENT, "n_group": 4, "topk_group": 2}, routed=True),
    TinyModel("DeepSeek V3, plain rope, no groups", "DeepseekV3ForCausalLM", {
        **LATENT, "n_group": 1, "topk_group": 1, "rope_interleave": False, "first_k_dense_replace": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }, routed=True),
    TinyModel("gpt-oss", "GptOssForCausalLM", {
        "num_hidden_layers": 4, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 9,
        "intermediate_size": 32, "swiglu_limit": 0.8,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False,
            "beta_fast": 32.0, "beta_slow": 1.0, "rope_theta": 10_000.0,
        },
    }, routed=True),
]  # fmt: skip


def tiny_config(model: TinyModel) -> Any:
    """The configuration, as an object of transformers."""
    return getattr(transformers, model.class_name).config_class(**{**COMMON, **model.overrides})


def find_tiny(name: str) -> TinyModel:
    (model,) = [model for model in TINY_MODELS if model.name == name]
    return model


def make_tiny(model: TinyModel, directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Writes config.json and model.safetensors into `directory`; the same arguments give the same bytes."""
    network_class = getattr(transformers, model.class_name)
    config = tiny_config(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = network_class(config).float().eval()
        with torch.no_grad():
            for name, parameter in [*network.named_parameters(), *network.named_buffers()]:
                _randomize(name, parameter, model.norms_around, config.tie_word_embeddings)
    network.to(dtype).save_pretrained(directory)
    return directory


def _randomize(name: str, parameter: torch.Tensor, norms_around: float, tied: bool) -> None:
    """Weights large enough that logits differ clearly between tokens; norm weights and biases are not trivial."""
    if "inv_freq" in name or "embed_scale" in name:
        return
    if "norm" in name:
        parameter.uniform_(norms_around - 0.5, norms_around + 0.5)
    elif name.endswith("sinks"):
        parameter.normal_(0.0, 1.0)
    elif name.endswith("bias") or parameter.dim() == 1:
        parameter.normal_(0.0, 0.1)
    elif name.endswith(("gate.weight", "router.weight")):  # sharp, so that rounding rarely changes the choice
        parameter.normal_(0.0, 5.0 / parameter.shape[-1] ** 0.5)
    elif "embed_tokens" in name and not tied:
        parameter.normal_(0.0, 1.0)
    else:
        parameter.normal_(0.0, 1.2 / parameter.shape[-1] ** 0.5)

"""Names of DeepSeek weights: from a checkpoint's to the network's.

`{}` is the layer, then the expert; `:gate` a part of a fused weight.
"""

from __future__ import annotations

from typing import Any

from max_ray.weights.mapping import NameMap, with_bare_names

_ATTENTION = [
    ("q_a_proj", "query_down"),
    ("q_a_layernorm", "query_norm"),
    ("q_b_proj", "query"),
    ("q_proj", "query"),
    ("kv_a_proj_with_mqa", "latent_down"),
    ("kv_a_layernorm", "latent_norm"),
    ("kv_b_proj", "up"),
    ("o_proj", "out"),
]
_MLP = [("gate_proj", "gate_up", ":gate"), ("up_proj", "gate_up", ":up"), ("down_proj", "down", "")]
_PLACES = [("mlp", "mlp"), ("mlp.shared_experts", "mlp.shared"), ("mlp.experts.{}", "mlp.experts.all.{}")]


_GGUF_ATTENTION = [
    ("attn_q", "query"),
    ("attn_q_a", "query_down"),
    ("attn_q_a_norm", "query_norm"),
    ("attn_q_b", "query"),
    ("attn_kv_a_mqa", "latent_down"),
    ("attn_kv_a_norm", "latent_norm"),
    ("attn_kv_b", "up"),
    ("attn_output", "out"),
]
_GGUF_PLACES = [("ffn_{}", "mlp"), ("ffn_{}_shexp", "mlp.shared"), ("ffn_{}_exps.{{}}", "mlp.experts.all.{}")]


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names. Layers after the last, which predict a token further ahead, are dropped."""
    num_layers = huggingface_config.num_hidden_layers
    num_extra = huggingface_config.get("num_nextn_predict_layers") or 0
    table: list[tuple[str, str | None]] = [
        (f"model.layers.{layer}.*", None) for layer in range(num_layers, num_layers + num_extra)
    ]
    table += [
        ("model.embed_tokens.weight", "embed_tokens.weight"),
        ("model.norm.weight", "norm.weight"),
        ("lm_head.weight", None if huggingface_config.get("tie_word_embeddings") else "lm_head.weight"),
        ("model.layers.{}.input_layernorm.weight", "layers.{}.attention_norm.weight"),
        ("model.layers.{}.post_attention_layernorm.weight", "layers.{}.mlp_norm.weight"),
        ("model.layers.{}.self_attn.rotary_emb.inv_freq", None),
        ("model.layers.{}.mlp.gate.weight", "layers.{}.mlp.router.scores.weight"),
        ("model.layers.{}.mlp.gate.e_score_correction_bias", "layers.{}.mlp.router.bias"),
    ]
    for theirs, ours in _ATTENTION:
        for kind in ("weight", "bias"):
            table.append((f"model.layers.{{}}.self_attn.{theirs}.{kind}", f"layers.{{}}.attention.{ours}.{kind}"))
    for their_place, our_place in _PLACES:
        for theirs, ours, part in _MLP:
            name = f"model.layers.{{}}.{their_place}.{theirs}.weight"
            table.append((name, f"layers.{{}}.{our_place}.{ours}.weight{part}"))
    return NameMap(with_bare_names(table))


def gguf_name_map(huggingface_config: Any) -> NameMap:
    """The table for GGUF's names. A file without `output` is tied; layers after the last are dropped."""
    num_layers = huggingface_config.num_hidden_layers
    num_extra = huggingface_config.get("num_nextn_predict_layers") or 0
    table: list[tuple[str, str | None]] = [
        (f"blk.{layer}.*", None) for layer in range(num_layers, num_layers + num_extra)
    ]
    table += [
        ("token_embd.weight", "embed_tokens.weight"),
        ("output_norm.weight", "norm.weight"),
        ("output.weight", None if huggingface_config.get("tie_word_embeddings") else "lm_head.weight"),
        ("blk.{}.attn_norm.weight", "layers.{}.attention_norm.weight"),
        ("blk.{}.ffn_norm.weight", "layers.{}.mlp_norm.weight"),
        ("blk.{}.ffn_gate_inp.weight", "layers.{}.mlp.router.scores.weight"),
        ("blk.{}.exp_probs_b.bias", "layers.{}.mlp.router.bias"),
    ]
    for theirs, ours in _GGUF_ATTENTION:
        for kind in ("weight", "bias"):
            table.append((f"blk.{{}}.{theirs}.{kind}", f"layers.{{}}.attention.{ours}.{kind}"))
    for their_place, our_place in _GGUF_PLACES:
        for theirs, ours, part in _MLP:
            name = f"blk.{{}}.{their_place.format(theirs.removesuffix('_proj'))}.weight"
            table.append((name, f"layers.{{}}.{our_place}.{ours}.weight{part}"))
    return NameMap(table)

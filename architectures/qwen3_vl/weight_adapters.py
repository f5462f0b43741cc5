"""Names of Qwen3-VL weights: from a checkpoint's to the network's. `{}` is the layer; `:q` a part of a fused weight."""

from __future__ import annotations

from typing import Any

from max_ray.weights.mapping import NameMap

Table = list[tuple[str, str | None]]

_ATTENTION = [("q_proj", "qkv", ":q"), ("k_proj", "qkv", ":k"), ("v_proj", "qkv", ":v"), ("o_proj", "out", "")]
_BLOCK = {
    "norm1": "attention_norm",
    "attn.qkv": "qkv",
    "attn.proj": "out",
    "norm2": "mlp_norm",
    "mlp.linear_fc1": "up",
    "mlp.linear_fc2": "down",
}
_MERGER = {"norm": "norm", "linear_fc1": "up", "linear_fc2": "down"}
_LAYER = "model.language_model.layers.{}"


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names. A tied checkpoint may carry a copy of the embedding as its head: dropped."""
    mlp = [
        (f"{_LAYER}.mlp.gate_proj.weight", "layers.{}.mlp.gate_up.weight:gate"),
        (f"{_LAYER}.mlp.up_proj.weight", "layers.{}.mlp.gate_up.weight:up"),
        (f"{_LAYER}.mlp.down_proj.weight", "layers.{}.mlp.down.weight"),
    ]
    return NameMap([*text_table(huggingface_config), *mlp, *vision_table()])


def text_table(huggingface_config: Any) -> Table:
    """All of the text model but its feed-forward layers."""
    tied = bool(huggingface_config.get("tie_word_embeddings"))
    table: Table = [
        ("model.language_model.embed_tokens.weight", "embed_tokens.weight"),
        ("model.language_model.norm.weight", "norm.weight"),
        ("lm_head.weight", None if tied else "lm_head.weight"),
        (f"{_LAYER}.input_layernorm.weight", "layers.{}.attention_norm.weight"),
        (f"{_LAYER}.post_attention_layernorm.weight", "layers.{}.mlp_norm.weight"),
        (f"{_LAYER}.self_attn.q_norm.weight", "layers.{}.attention.q_norm.weight"),
        (f"{_LAYER}.self_attn.k_norm.weight", "layers.{}.attention.k_norm.weight"),
    ]
    for theirs, ours, part in _ATTENTION:
        for kind in ("weight", "bias"):
            table.append((f"{_LAYER}.self_attn.{theirs}.{kind}", f"layers.{{}}.attention.{ours}.{kind}{part}"))
    return table


def vision_table() -> Table:
    """The vision tower."""
    table: Table = [("model.visual.pos_embed.weight", "visual.positions.weight")]
    for kind in ("weight", "bias"):
        table.append((f"model.visual.patch_embed.proj.{kind}", f"visual.patch_embedding.{kind}"))
        for theirs, ours in _BLOCK.items():
            table.append((f"model.visual.blocks.{{}}.{theirs}.{kind}", f"visual.layers.{{}}.{ours}.{kind}"))
        for theirs, ours in _MERGER.items():
            table.append((f"model.visual.merger.{theirs}.{kind}", f"visual.merger.{ours}.{kind}"))
            table.append(
                (f"model.visual.deepstack_merger_list.{{}}.{theirs}.{kind}", f"visual.deepstack.{{}}.{ours}.{kind}")
            )
    return table

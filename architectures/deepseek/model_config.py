"""DeepseekConfig: the numbers of one DeepSeek-V2 or -V3 checkpoint, read once from config.json and frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from max_ray.errors import ConfigError
from max_ray.huggingface import required
from max_ray.nn.activation import activation_name
from max_ray.nn.latent_attention import LatentAttentionShape
from max_ray.nn.rope import RopeConfig


@dataclass(frozen=True)
class RoutingConfig:
    """How a token finds its experts.

    sigmoid: scores are a sigmoid and a learned bias counts in the choice (V3); otherwise a softmax (V2).
    num_groups: experts are chosen from the best `num_groups_kept` groups only; 1 where there are no groups.
    best_of_group: how many of a group's best experts its worth is the sum of.
    renormalize: whether the weights are made to sum to 1, before `scale` multiplies them.
    """

    num_experts: int
    num_experts_per_token: int
    num_groups: int
    num_groups_kept: int
    best_of_group: int
    sigmoid: bool
    renormalize: bool
    scale: float


@dataclass(frozen=True)
class DeepseekConfig:
    """Shapes of the whole model, before it is cut over ranks.

    intermediate_size: width of the first `num_dense_layers` layers' feed-forward; expert_size: of one expert;
    shared_size: of the expert that every token goes to, 0 without one.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    expert_size: int
    shared_size: int
    num_layers: int
    num_dense_layers: int
    rms_norm_eps: float
    activation: str
    rope: RopeConfig
    attention: LatentAttentionShape
    routing: RoutingConfig
    tie_word_embeddings: bool

    @property
    def num_heads(self) -> int:
        return self.attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        """One latent a token, whole on every rank."""
        return 1

    @property
    def head_dim(self) -> int:
        """Numbers in the cache for a token and layer."""
        return self.attention.latent_dim + self.attention.rope_dim

    @property
    def widths(self) -> dict[str, int]:
        """Sizes that the ranks must divide, by their names in config.json."""
        sizes = {}
        if self.num_dense_layers:
            sizes["intermediate_size"] = self.intermediate_size
        if self.num_dense_layers < self.num_layers:
            sizes["moe_intermediate_size"] = self.expert_size
        return sizes

    @classmethod
    def v2(cls, config: Any) -> DeepseekConfig:
        """From config.json of a DeepSeek-V2, as an attribute-style mapping. Raises ConfigError for a value that this
        family lacks."""
        method = config.get("topk_method") or "greedy"
        if method not in ("greedy", "group_limited_greedy"):
            raise ConfigError(f"config.json: topk_method={method!r}; DeepSeek-V2 has greedy and group_limited_greedy.")
        if config.get("scoring_func", "softmax") != "softmax":
            raise ConfigError(f"config.json: scoring_func={config.scoring_func!r}, but DeepSeek-V2 has 'softmax' only.")
        if config.get("norm_topk_prob"):
            raise ConfigError("config.json: norm_topk_prob=true is not supported for DeepSeek-V2.")
        has_groups = method == "group_limited_greedy"
        return cls._read(
            config,
            RoutingConfig(
                num_experts=required(config, "n_routed_experts"),
                num_experts_per_token=required(config, "num_experts_per_tok"),
                num_groups=required(config, "n_group") if has_groups else 1,
                num_groups_kept=required(config, "topk_group") if has_groups else 1,
                best_of_group=1,
                sigmoid=False,
                renormalize=False,
                scale=_number(config, "routed_scaling_factor", 1.0),
            ),
            interleaved=True,
        )

    @classmethod
    def v3(cls, config: Any) -> DeepseekConfig:
        """The same of a DeepSeek-V3 (and R1)."""
        for name, known in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
            if config.get(name, known) != known:
                raise ConfigError(f"config.json: {name}={config.get(name)!r}, but DeepSeek-V3 has {known!r} only.")
        return cls._read(
            config,
            RoutingConfig(
                num_experts=required(config, "n_routed_experts"),
                num_experts_per_token=required(config, "num_experts_per_tok"),
                num_groups=config.get("n_group", 8) or 1,
                num_groups_kept=config.get("topk_group", 4) or 1,
                best_of_group=2,
                sigmoid=True,
                renormalize=bool(config.get("norm_topk_prob", True)),
                scale=_number(config, "routed_scaling_factor", 2.5),
            ),
            interleaved=bool(config.get("rope_interleave", True)),
        )

    @classmethod
    def _read(cls, config: Any, routing: RoutingConfig, *, interleaved: bool) -> DeepseekConfig:
        _refuse_unknown(config, routing)
        num_layers = required(config, "num_hidden_layers")
        expert_size = required(config, "moe_intermediate_size")
        rope = RopeConfig.of_whole_heads(config, required(config, "qk_rope_head_dim"))
        if rope.depends_on_length:
            raise ConfigError(f"config.json: rope_type {rope.rope_type!r} is not supported for the DeepSeek family.")
        return cls(
            vocab_size=required(config, "vocab_size"),
            hidden_size=required(config, "hidden_size"),
            intermediate_size=required(config, "intermediate_size"),
            expert_size=expert_size,
            shared_size=expert_size * (config.get("n_shared_experts") or 0),
            num_layers=num_layers,
            num_dense_layers=min(config.get("first_k_dense_replace") or 0, num_layers),
            rms_norm_eps=config.get("rms_norm_eps") or 1e-6,
            activation=activation_name(config),
            rope=rope,
            attention=_attention(config, rope, interleaved),
            routing=routing,
            tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        )


def _refuse_unknown(config: Any, routing: RoutingConfig) -> None:
    if config.get("mlp_bias"):
        raise ConfigError("config.json: mlp_bias=true is not supported for the DeepSeek family.")
    if (config.get("moe_layer_freq") or 1) != 1:
        raise ConfigError(f"config.json: moe_layer_freq={config.moe_layer_freq}, but the DeepSeek family has 1 only.")
    if routing.num_experts % routing.num_groups:
        raise ConfigError(
            f"config.json: n_routed_experts={routing.num_experts} experts cannot be put into n_group="
            f"{routing.num_groups} groups of one size."
        )


def _attention(config: Any, rope: RopeConfig, interleaved: bool) -> LatentAttentionShape:
    plain_dim = required(config, "qk_nope_head_dim")
    return LatentAttentionShape(
        dim=required(config, "hidden_size"),
        num_heads=required(config, "num_attention_heads"),
        query_rank=config.get("q_lora_rank"),
        latent_dim=required(config, "kv_lora_rank"),
        plain_dim=plain_dim,
        rope_dim=rope.dim,
        value_dim=required(config, "v_head_dim"),
        scale=(plain_dim + rope.dim) ** -0.5 * _stretch(rope) ** 2,
        interleaved=interleaved,
        bias=bool(config.get("attention_bias")),
    )


def _stretch(rope: RopeConfig) -> float:
    """yarn's mscale over all dimensions, which DeepSeek puts on queries and keys: 0.1 m ln(factor) + 1."""
    weight, factor = rope.scaling.get("mscale_all_dim"), rope.scaling.get("factor")
    if rope.rope_type == "default" or not weight or not factor or factor <= 1:
        return 1.0
    return 0.1 * float(weight) * math.log(float(factor)) + 1.0


def _number(config: Any, name: str, default: float) -> float:
    given = config.get(name)
    return default if given is None else float(given)

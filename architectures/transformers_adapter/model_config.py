"""AdapterConfig: what serving needs to know of a network of `transformers`, found by looking at the network itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from architectures.transformers_adapter.attention import LayerCall
from architectures.transformers_adapter.class_names import class_names
from architectures.transformers_adapter.long_rope import KIND, pretraining_length
from architectures.transformers_adapter.probe import probe
from architectures.transformers_adapter.skeleton import network_config
from max_ray.errors import ConfigError

_RECURRENT = ("linear", "mamba", "conv", "recurrent", "rwkv", "ssm", "delta", "kda", "lightning")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions")
_BY_LENGTH = ("dynamic", KIND)  # kinds of rope whose angles depend on the longest position of a batch


@dataclass(frozen=True)
class AdapterConfig:
    """Counts are of the whole network. calls: one a layer of the cache. max_length: tokens that the network was made
    for, and not more than a chunk where its attention is in chunks; None where its configuration does not say.
    rope_length: tokens up to which a rope that depends on the length of the sequence does not (see long_rope.py).
    tp_plan: module or parameter pattern -> `transformers`' style."""

    class_name: str
    calls: tuple[LayerCall, ...]
    max_length: int | None
    rope_length: int | None
    tp_plan: tuple[tuple[str, str], ...]

    @property
    def num_kv_heads(self) -> int:
        return max(call.num_kv_heads for call in self.calls)

    @property
    def head_dim(self) -> int:
        """Width of a head in the cache: of the widest key or value."""
        return max(max(call.key_dim, call.value_dim) for call in self.calls)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> AdapterConfig:
        """Looks at the network that config.json describes (once for each). Raises ConfigError with the reason where
        the adapter cannot run it."""
        values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        return _looked_at(json.dumps(values, sort_keys=True))


def class_of(config: Mapping[str, Any]) -> str | None:
    """The causal language model of `transformers` that config.json names or means; None without one."""
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    names = [*(config.get("architectures") or []), *class_names(config)]
    return next((name for name in names if name in known and "ConditionalGeneration" not in name), None)


@lru_cache(maxsize=16)
def _looked_at(values_json: str) -> AdapterConfig:
    values = json.loads(values_json)
    class_name = class_of(values)
    if class_name is None:
        raise ConfigError(
            f"The installed transformers has no causal language model {values.get('architectures')}, so its code "
            "cannot be used."
        )
    config = network_config(values)
    _check_kind(class_name, config)
    calls, plan = probe(class_name, config)
    rope_length = pretraining_length(config)
    limits = [length for length in (_max_length(config), *(call.limit for call in calls)) if length is not None]
    return AdapterConfig(class_name, calls, min(limits, default=None), rope_length, tuple(sorted(plan.items())))


def _check_kind(class_name: str, config: Any) -> None:
    """Raises ConfigError for what can be said without looking at the network."""
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{class_name} cannot run on a paged cache: it is half of an encoder-decoder.")
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or []}
    recurrent = sorted(kind for kind in kinds if any(word in kind for word in _RECURRENT))
    if recurrent:
        raise ConfigError(f"{class_name} cannot run on a paged cache: it has layers of {', '.join(recurrent)}.")
    if getattr(getattr(transformers, class_name), "_is_stateful", False):
        raise ConfigError(
            f"{class_name} cannot run on a paged cache: it keeps a state of its own (recurrent or compressed)."
        )


def _max_length(config: Any) -> int | None:
    """Where the angles of the rope depend on the longest sequence, lengths up to which they do not, unless long_rope.py
    takes them from each token's own."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [
        rope if pretraining_length(config) is None else {},
        *(value for value in rope.values() if isinstance(value, dict)),
    ]
    for kind in kinds:
        if kind.get("rope_type") in _BY_LENGTH and kind.get("original_max_position_embeddings"):
            return int(kind["original_max_position_embeddings"])
    found = (getattr(config, name, None) for name in _LENGTHS)
    return next((int(length) for length in found if isinstance(length, int) and length > 0), None)

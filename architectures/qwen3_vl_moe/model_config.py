"""The numbers of a Qwen3-VL mixture of experts: its text model's are a Qwen3 mixture's, its tower's a Qwen3-VL's."""

from __future__ import annotations

from typing import Any

from architectures.qwen3_moe.model_config import Qwen3MoeConfig
from architectures.qwen3_vl.model_config import text_config
from max_ray.huggingface import HuggingFaceConfig

_DENSE_WIDTH = 5632  # of the layers that are no mixture, where config.json does not say


def moe_config(config: Any) -> Qwen3MoeConfig:
    """From the whole config.json. The weights of a token's experts always sum to 1 in this family. Raises ConfigError
    for a value that it lacks."""
    values = {"intermediate_size": _DENSE_WIDTH, **text_config(config).to_dict(), "norm_topk_prob": True}
    return Qwen3MoeConfig.from_huggingface(HuggingFaceConfig(values, "config.json: text_config"))

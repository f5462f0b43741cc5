"""Multimodal networks whose text network runs without its towers: the configuration of that network alone.

Listed are those that give for a text without images what their text network gives: its tokens see no later ones, and
nothing of a tower goes into it. For the tensors see max_ray/weights/text_part.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from architectures.transformers_adapter.class_names import PUBLISHED
from architectures.transformers_adapter.skeleton import network_config

TEXT_PART_OF = "text_part_of"
"""Key of the text network's configuration: the class of the whole."""

KINDS = (
    *("gemma3", "gemma3n", "gemma4", "mistral3", "qwen2_vl", "qwen2_5_vl", "llava", "llava_next", "llava_onevision"),
    *("aya_vision", "cohere2_vision", "idefics3", "smolvlm", "internvl", "lighton_ocr", "exaone4_5", "kimi_k25"),
    *("llama4", "qwen3_5", "qwen3_5_moe", "lfm2_vl"),  # their text networks are refused for what they are
)
"""The values of model_type in config.json."""

_SAME_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2"}
"""model_type of a text network that has no class of its own -> of the network that it is for a text alone."""
_OF_THE_WHOLE = ("quantization_config", "dtype", "torch_dtype")
_NO_NUMBERS = ("id2label", "label2id", "dtype", "torch_dtype", "transformers_version")


def text_network(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The values of the text network's config.json, all that are not given as `transformers` has them by default; None
    where config.json describes none of these networks. Raises ConfigError for values that `transformers` refuses."""
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kind = str(values.get("model_type"))
    whole = _class_of_the_whole(kind)
    names = [PUBLISHED.get((name, kind), name) for name in values.get("architectures") or [whole]]
    if kind not in KINDS or whole is None or names != [whole]:
        return None
    given = values.get("text_config") or {}
    text: dict[str, Any] = json.loads(network_config(values).text_config.to_json_string(use_diff=False))
    text = {name: value for name, value in text.items() if name not in _NO_NUMBERS}
    for part in (values, given):
        text |= {name: part[name] for name in _OF_THE_WHOLE if part.get(name)}
    if not given.get("architectures"):
        text.pop("architectures", None)
    for name in ("eos_token_id", "bos_token_id"):
        if values.get(name) is not None:
            text[name] = values[name]
    return _as_known(text) | {TEXT_PART_OF: whole}


def _class_of_the_whole(kind: str) -> str | None:
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    return name if isinstance(name, str) else None


def _as_known(text: dict[str, Any]) -> dict[str, Any]:
    """For a text alone the three positions of a token (time, height, width) are one: the rope is the usual one."""
    same = _SAME_AS.get(str(text.get("model_type")))
    if same is None:
        return text
    rope = {name: value for name, value in (text.get("rope_parameters") or {}).items() if name != "mrope_section"}
    if rope.get("rope_type") == "mrope":
        rope["rope_type"] = "default"
    return text | {"model_type": same, "rope_parameters": {n: v for n, v in rope.items() if n != "type"}}

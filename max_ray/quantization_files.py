"""The settings of a quantized checkpoint, where they lie: in config.json, or in a file of their own beside it.

    config.json: quantization_config      what most tools write; compression_config: llm-compressor before 2025
    hf_quant_config.json                  NVIDIA's Model Optimizer
    quantize_config.json                  AutoGPTQ, GPTQModel
    quant_config.json                     AutoAWQ and llm-awq
    quantization_config.json              AutoRound

All are brought into the form of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from max_ray.errors import ConfigError

_AWQ_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}


def quantization_settings(
    config: Mapping[str, Any], folder: Path, read: Callable[[Path], dict[str, Any]]
) -> tuple[dict[str, Any], str] | None:
    """What a model's config.json, or a file beside it, says of quantized weights, and where; None for plain weights.

    read: gives the object in a JSON file. Raises ConfigError for a value that is no object, and what `read` raises.
    """
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            return _settings(config[key], f"config.json: {key}", _METHOD_OF_KEY.get(key))
    for name, method in _METHOD_OF_FILE.items():
        file = folder / name
        if file.is_file():
            return _settings(read(file), str(file), method)
    return None


_METHOD_OF_KEY = {"compression_config": "compressed-tensors"}
_METHOD_OF_FILE = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quantization_config.json": None,
}


def _settings(values: Any, place: str, method: str | None) -> tuple[dict[str, Any], str] | None:
    """method: the `quant_method` where the settings name none."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place} must be an object, not {values!r:.80}.")
    settings = dict(values)
    settings["quant_method"] = str(settings.get("quant_method") or method or "").lower().removeprefix("intel/")
    if settings["quant_method"] == "modelopt":
        return _of_modelopt(settings, place)
    if settings["quant_method"] == "awq":
        settings |= {ours: settings[theirs] for theirs, ours in _AWQ_NAMES.items() if theirs in settings}
    return settings, place


def _of_modelopt(settings: dict[str, Any], place: str) -> tuple[dict[str, Any], str] | None:
    """The file has the numbers under `quantization`; without an algorithm only the cache is quantized."""
    nested = settings.get("quantization")
    flat = {**settings, **nested} if isinstance(nested, Mapping) else settings
    return (flat, place) if flat.get("quant_algo") else None

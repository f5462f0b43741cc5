"""Networks of `transformers` on the meta device: modules and names, no memory; then, piece by piece, with memory."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from threading import Lock
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import initialization
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from architectures.transformers_adapter.attention import PROBING, register
from architectures.transformers_adapter.published_configs import as_transformers
from max_ray.errors import ConfigError

_BUILDING = Lock()  # transformers sets torch's default dtype and patches initialisers while it builds
FOREIGN_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)
"""What modelling code that is used in a way it does not support may raise."""
_NOT_FOR_THE_NETWORK = ("quantization_config", "dtype", "torch_dtype", "auto_map", "transformers_version")


def network_config(values: Mapping[str, Any]) -> Any:
    """config.json's values as `transformers`' own configuration object. Raises ConfigError for values it refuses."""
    values = as_transformers(values)
    model_type = str(values.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"The installed transformers knows no model_type {model_type!r} (config.json).")
    kept = {name: _number(value) for name, value in values.items() if name not in _NOT_FOR_THE_NETWORK}
    try:
        return CONFIG_MAPPING[model_type].from_dict(kept)
    except (*FOREIGN_ERRORS, StrictDataclassError) as error:
        raise ConfigError(f"transformers refuses this config.json: {one_line(error)}") from error


def _number(value: Any) -> Any:
    """transformers writes infinities into config.json as {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    if not isinstance(value, dict):
        return value
    return float(value["__float__"]) if list(value) == ["__float__"] else {k: _number(v) for k, v in value.items()}


def build_skeleton(class_name: str, config: Any, dtype: torch.dtype, implementation: str) -> Any:
    """The network on the meta device, its tied weights tied. Raises ConfigError where `transformers` cannot build it.

    While a network is probed its experts multiply in a way that needs no numbers (see probe.py).
    """
    register()
    experts = {"experts_implementation": "batched_mm"} if implementation == PROBING else {}
    network_class = getattr(transformers, class_name)
    with _BUILDING, torch.device("meta"), initialization.meta_device_safe_creation_ops():
        try:
            network = network_class._from_config(
                deepcopy(config), dtype=dtype, attn_implementation=implementation, **experts
            )
        except (*FOREIGN_ERRORS, ImportError) as error:
            if isinstance(error, KeyError) and implementation in str(error):
                reason = "its attention does not go through transformers' attention interface"
                raise ConfigError(f"{class_name} cannot run on a paged cache: {reason}.") from error
            raise ConfigError(f"transformers cannot build {class_name}: {one_line(error)}") from error
        network.tie_weights()
    network.eval()
    network.config.use_cache = False
    return network


def computed_buffers(network: Any, stored: Collection[str]) -> set[str]:
    """Names of the buffers that no checkpoint has (rope frequencies), or that this one has not."""
    never = {name for name, _ in network.named_non_persistent_buffers()}
    return never | {name for name, _ in network.named_buffers() if name not in stored}


def fill_computed_buffers(network: Any, names: Collection[str], device: torch.device) -> None:
    """Memory and values for computed buffers, as `from_pretrained` makes them: by the network's own `_init_weights`.
    All parameters count as loaded; those that it writes to all the same must be loaded after this."""
    for prefix, module in network.named_modules():
        own = [name for name in module._buffers if f"{prefix}.{name}".lstrip(".") in names]
        for name in own:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        module._is_hf_initialized = not own
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor._is_hf_initialized = True
    for name in names:
        network.get_buffer(name)._is_hf_initialized = False
    with _BUILDING:
        network.initialize_weights()


def float32_names(network: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Which weights the network keeps in float32 while the rest is `dtype`; None where there are none."""
    from transformers.core_model_loading import build_glob_alternation

    plan = network._get_dtype_plan(dtype)
    return build_glob_alternation(list(plan))[0] if plan else None


def one_line(error: BaseException) -> str:
    """An error of foreign code as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else f"{text[:300]}.."

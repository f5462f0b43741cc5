"""Blocks of `models`: settings of one model each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from max_ray.errors import ConfigError

_BLOCK_NAMES = {"name": "served_model_name", "aliases": "served_model_aliases"}
"""Shorter names of settings in a block of `models`."""
_OF_A_MODEL = (
    *("min_replicas", "max_replicas", "scale_to_zero_after_s", "target_ongoing_requests"),
    *("max_queued_requests", "max_queued_tokens"),
    *("lease_grace_s", "worker_start_timeout_s", "collective_timeout_s", "worker_port_range"),
)
"""Settings of serving that each model may have its own of."""


def block_settings(block: Mapping[str, Any], of_models: Collection[str], of_all: Collection[str]) -> dict[str, Any]:
    """The settings of a block by their full names.

    Args:
        block: As it was given, without aliases of settings.
        of_models: Names of the settings of a PipelineConfig.
        of_all: Names of the settings of a ServeConfig.

    Raises:
        ConfigError: One of them is for all models, or the model is missing.
    """
    named = {_BLOCK_NAMES.get(name, name): value for name, value in block.items()}
    for name in named:
        if name in of_all and name not in (*of_models, *_OF_A_MODEL):
            raise ConfigError(f"{name} is for all models: put it beside models.")
    if not named.get("model_path"):
        raise ConfigError("model_path is missing.")
    return named

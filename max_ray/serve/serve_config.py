"""The configuration of a served application: ServeConfig from all sources, with the bundled demo model as default."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import max_ray
from max_ray.config import Origins, ServeConfig, load_config

DEMO_MODEL = Path(max_ray.__file__).parents[1] / "deployments" / "demo" / "shakespeare"


def load_serve_config(
    arguments: Mapping[str, Any],
    *,
    config_file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    arguments_are: str = "argument",
) -> tuple[ServeConfig, Origins]:
    """`load_config` for ServeConfig; without a model path from any source, the bundled demo model.

    arguments_are: what `arguments` are to the user, as `--print-config` and errors say it. Raises ConfigError.
    """
    config, origins = load_config(
        ServeConfig, arguments, config_file=config_file, environ=environ, arguments_are=arguments_are
    )
    if config.model_path or config.models:
        return config, origins
    return config.replace(model_path=str(DEMO_MODEL)), origins | {"model_path": "default: the bundled demo model"}

"""Configuration: frozen, validated, parsed once. Every setting is a field of PipelineConfig or ServeConfig.

    default < YAML file < environment MAX_RAY_* < command line, builder arguments, Python

`models` holds the settings, `sources` merges where they come from. No torch here.
"""

from max_ray.config.models import DeviceChoice, PipelineConfig, ServeConfig, SettingsError
from max_ray.config.sources import Origins, load_config

__all__ = ["DeviceChoice", "Origins", "PipelineConfig", "ServeConfig", "SettingsError", "load_config"]

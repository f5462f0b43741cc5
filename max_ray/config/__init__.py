"""Configuration: frozen, validated, parsed once. Every setting is a field of PipelineConfig or ServeConfig.

    default < YAML file < environment MAX_RAY_* < command line, builder arguments, Python

`models` holds the settings, `sources` merges where they come from. No torch here.
"""

from max_ray.config.models import PipelineConfig, ServeConfig
from max_ray.config.problems import SettingsError
from max_ray.config.sources import Origins, load_config
from max_ray.config.values import DeviceChoice

__all__ = ["DeviceChoice", "Origins", "PipelineConfig", "ServeConfig", "SettingsError", "load_config"]

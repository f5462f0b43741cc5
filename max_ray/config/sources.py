"""Merges the sources of a configuration and remembers where each value came from.

    default < YAML file < environment MAX_RAY_* < arguments (command line, builder, Python)

The file and the environment are shared by all commands: a setting of ServeConfig in them is no error for a command
that only needs a PipelineConfig, and is left out there. Arguments must be settings of the class asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from max_ray import settings
from max_ray.config.models import PipelineConfig, ServeConfig
from max_ray.config.problems import ALIASES, SettingsError, unknown_setting
from max_ray.errors import ConfigError, nearest
from max_ray.log import get_logger

_logger = get_logger(__name__)

ConfigT = TypeVar("ConfigT", bound=PipelineConfig)
Origins = dict[str, str]
"""Setting -> where its value came from, in words: "default", "file x.yaml", "environment MAX_RAY_PORT", ..."""


class _Loader(yaml.SafeLoader):
    """A setting that stands twice in a file is a mistake, not a choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load_config(
    cls: type[ConfigT],
    arguments: Mapping[str, Any],
    *,
    config_file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    arguments_are: str = "argument",
) -> tuple[ConfigT, Origins]:
    """The frozen configuration from all sources, and the origin of each setting.

    config_file: a YAML file of settings (default: MAX_RAY_CONFIG). environ: default, the process environment.
    defaults: values below all sources (the bundled model). arguments_are: the word for `arguments` in origins.
    Raises SettingsError, each sentence with the origin of the wrong value; ConfigError for an unreadable file.
    """
    variables = settings.environment() if environ is None else settings.our_variables(environ)
    path = config_file or variables.get(settings.CONFIG_FILE)
    layers: list[tuple[str, dict[str, Any]]] = [("default", dict(defaults or {}))]
    if path is not None:
        layers.append((f"file {path}", _shared(cls, _read_file(Path(path)), f"file {path}")))
    layers.append(("environment", _shared(cls, _read_variables(variables), "environment")))
    layers.append((arguments_are, {ALIASES.get(name, name): value for name, value in arguments.items()}))
    values: dict[str, Any] = {}
    origins: Origins = dict.fromkeys(cls.model_fields, "default")
    for origin, layer in layers:
        values |= layer
        origins |= {name: _origin(origin, name) for name in layer}
    return _build(cls, values, origins), origins


def _origin(layer: str, name: str) -> str:
    return f"environment {settings.PREFIX}{name.upper()}" if layer == "environment" else layer


def _build(cls: type[ConfigT], values: dict[str, Any], origins: Origins) -> ConfigT:
    """Validates; adds the origin to each problem."""
    try:
        return cls(**values)
    except SettingsError as error:
        problems = [(name, _with_origin(sentence, origins.get(name, ""))) for name, sentence in error.problems]
        raise SettingsError(problems) from None


def _with_origin(sentence: str, origin: str) -> str:
    return sentence if origin in ("", "default") else f"{sentence} (Set by: {origin}.)"


def _read_file(path: Path) -> dict[str, Any]:
    """The settings of a YAML file. Raises ConfigError."""
    try:
        content = yaml.load(path.expanduser().read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"There is no configuration file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"The configuration file {path} cannot be used: {_yaml_problem(error)}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"The configuration file {path} must hold settings as 'name: value' lines.")
    return content


def _yaml_problem(error: yaml.YAMLError) -> str:
    """What and where, without the text of the file: it may hold keys."""
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1})" if mark is not None else ""
    return f"{getattr(error, 'problem', None) or getattr(error, 'reason', 'it cannot be parsed')}{where}"


def _read_variables(variables: Mapping[str, str]) -> dict[str, Any]:
    """MAX_RAY_* variables by setting. One that nothing reads is warned of: other programs share the environment."""
    found: dict[str, Any] = {}
    known = {settings.PREFIX + name.upper() for name in [*ServeConfig.model_fields, *ALIASES]}
    for variable, value in variables.items():
        if variable in settings.OTHER_VARIABLES:
            continue
        if variable not in known:
            hint = nearest(variable, known | settings.OTHER_VARIABLES)
            _logger.warning("There is no setting for the environment variable %s: it is ignored.%s", variable, hint)
            continue
        found[variable.removeprefix(settings.PREFIX).lower()] = value
    return found


def _shared(cls: type[PipelineConfig], layer: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A layer that all commands share, for `cls`: unknown settings raise, those of other commands are left out."""
    result: dict[str, Any] = {}
    for given, value in layer.items():
        name = ALIASES.get(given, given)
        if name not in cls.model_fields and name not in ServeConfig.model_fields:
            raise SettingsError([(given, f"{unknown_setting(cls, given)} (Set by: {origin}.)")])
        if name in result:
            raise SettingsError([(name, f"{given} and {name} are the same setting: give one of them.")])
        if name in cls.model_fields:
            result[name] = value
    return result

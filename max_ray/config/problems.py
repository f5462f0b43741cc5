"""What is wrong with settings, in sentences."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from max_ray.errors import ConfigError, nearest

ALIASES = {"model": "model_path"}
"""Other spellings of a setting, accepted wherever settings are: the seed page prints `--model`."""


class SettingsError(ConfigError):
    """Settings that cannot work. `problems`: (setting, sentence), one each."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__(" ".join(sentence for _, sentence in problems))
        self.problems = problems

    def __reduce__(self) -> tuple[object, ...]:
        return (SettingsError, (self.problems,))


def settings_problems(cls: type[BaseModel], error: ValidationError) -> list[tuple[str, str]]:
    """pydantic's findings as (setting, sentence)."""
    consequences = ("default_factory_not_called",)
    found = [_problem(cls, d) for d in error.errors(include_url=False) if d["type"] not in consequences]
    return list(dict.fromkeys(found))


def _problem(cls: type[BaseModel], details: ErrorDetails) -> tuple[str, str]:
    name = str(details["loc"][0]) if details["loc"] else ""
    if details["type"] == "extra_forbidden":
        return name, unknown_setting(cls, name)
    if details["type"] == "missing" or (name == "model_path" and details["input"] == ""):
        return name, f"{name} is missing. {cls.model_fields[name].description}"
    if not name:
        return name, details["msg"]
    rule = details["msg"].replace("Input should", f"{name} should", 1)
    rule = rule if rule.startswith(name) else f"{name}: {rule}"
    shown = "" if name == "api_keys" or details["type"] in ("devices", "parser") else f", not {details['input']!r}"
    return name, f"{rule}{shown}."


def unknown_setting(cls: type[BaseModel], name: str) -> str:
    """The sentence for a name that is no setting of `cls`."""
    return f"There is no setting {name!r}.{nearest(name, [*cls.model_fields, *ALIASES])}"

"""The chat template of a model, from whichever of its files holds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from max_ray.errors import ConfigError
from max_ray.tokenization.loading.folder import read_json

_JINJA_FILE, _JSON_FILE, _OTHERS = "chat_template.jinja", "chat_template.json", "additional_chat_templates"


def read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """One template, or several by name; None where the model has none. Raises ConfigError for what is no text.

    chat_template.jinja counts first (further ones lie in additional_chat_templates/NAME.jinja), then
    tokenizer_config.json (config), then chat_template.json, which holds the template of the model's processor.
    """
    others = {path.stem: _text(path) for path in sorted((folder / _OTHERS).glob("*.jinja"))}
    if (folder / _JINJA_FILE).is_file():
        own = _text(folder / _JINJA_FILE)
        return {**others, "default": own} if others else own
    value, path = config.get("chat_template"), folder / "tokenizer_config.json"
    if value is None:
        value, path = read_json(folder / _JSON_FILE).get("chat_template"), folder / _JSON_FILE
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if not (value is None or isinstance(value, str) or _is_named(value)):
        raise ConfigError(f"{path}: chat_template must be a text, or a list of objects with name and template.")
    return {**value, **others} if isinstance(value, dict) else value


def _is_named(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}.") from error

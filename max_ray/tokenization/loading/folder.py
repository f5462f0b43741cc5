"""Where a model's tokenizer files lie, and how one of them is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from max_ray.errors import ConfigError, ModelPathError

_TOKENIZER_FILES = ("*.json", "*.jinja", "tokenizer*", "*.tiktoken", "*.model", "*.txt")


def local_folder(model_path: str, revision: str | None) -> Path:
    """The folder or .gguf file of that name, or what the hub has under it. Raises ModelPathError."""
    if Path(model_path).is_dir() or is_gguf(Path(model_path)):
        return Path(model_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model_path, revision=revision, allow_patterns=list(_TOKENIZER_FILES)))
    except (OSError, HFValidationError) as error:
        raise ModelPathError(
            f"{model_path!r} is neither a folder nor a model that the hub gives: {error}. Check the path."
        ) from error


def is_gguf(path: Path) -> bool:
    """Whether there is a .gguf file."""
    return path.suffix == ".gguf" and path.is_file()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file. Raises ConfigError."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def text_config(model_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that speaks of text: multimodal models nest it."""
    nested = model_config.get("text_config")
    return nested if isinstance(nested, dict) else model_config

"""Names of a model in the API, where the user gives none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from max_ray.gguf import own_name


def model_name(validated: dict[str, Any]) -> str:
    """A folder's name, a GGUF model's own name, or the repository id; "" while no model is chosen."""
    model_path: str = validated.get("model_path", "")
    path = Path(model_path).expanduser()
    if not model_path or not path.exists():
        return model_path
    return own_name(path) if path.is_file() and path.suffix == ".gguf" else path.resolve().name


def other_names(validated: dict[str, Any]) -> tuple[str, ...]:
    """The name of a GGUF file, where the model has another."""
    path = Path(validated.get("model_path", "")).expanduser()
    is_renamed = path.suffix == ".gguf" and validated.get("served_model_name") not in (path.name, None)
    return (path.name,) if is_renamed else ()

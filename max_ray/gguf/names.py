"""The name that a GGUF model has for itself, as the API shows it."""

from __future__ import annotations

import re
from pathlib import Path

from max_ray.errors import MaxRayError
from max_ray.gguf.file import read_gguf

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_ENCODING = re.compile(r"[-._](UD-)?(I?Q\d\w*|T?BF16|F16|F32|FP16|FP32|MXFP4\w*)$", re.IGNORECASE)
_NO_NAME_CHARACTERS = re.compile(r"[^A-Za-z0-9._]+")


def own_name(path: Path) -> str:
    """`SmolLM2-135M-Instruct` for SmolLM2-135M-Instruct.Q4_1.gguf.

    That is the file's name without number format, where it begins with the base name in the file. Other files, such as
    model.gguf or ggml-model-q4_0.gguf, have the file's `general.name`, with hyphens.
    """
    stem = _ENCODING.sub("", _SHARD.sub("", path.name.removesuffix(".gguf"))) or path.name
    try:
        metadata = read_gguf(path).metadata
    except (MaxRayError, OSError):
        return stem  # what is wrong with the file is said when it is read for its weights
    name, base = (_text(metadata.get(key)) for key in ("general.name", "general.basename"))
    base = base or name.partition("-")[0]
    is_named_by_model = bool(base) and _letters(stem).startswith(_letters(base))
    return stem if is_named_by_model or not name else name


def _text(value: object) -> str:
    return _NO_NAME_CHARACTERS.sub("-", value).strip("-") if isinstance(value, str) else ""


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())

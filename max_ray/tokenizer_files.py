"""The tokenizer files of a model as an object of `transformers`, without torch where that can be.

A folder whose tokenizer_config.json names no special class is loaded straight from tokenizer.json, and one that names
the class of its model type by that class: `AutoTokenizer` would give the same object but imports torch (several
seconds), which the HTTP replica otherwise never needs.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from max_ray.errors import ConfigError, ModelPathError
from max_ray.gguf import read_gguf

# Classes of tokenizer_config.json that are tokenizer.json and nothing else.
_GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
# Where transformers has the class of a model type (of config.json), which AutoTokenizer takes if it is named.
CLASS_OF = {
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe"), ("qwen2", "Qwen2Tokenizer")),
    **dict.fromkeys(("gemma2", "gemma3_text"), ("gemma", "GemmaTokenizer")),
    "bert": ("bert", "BertTokenizer"),
    "gpt2": ("gpt2", "GPT2Tokenizer"),
    "mpnet": ("mpnet", "MPNetTokenizer"),
    "xlm-roberta": ("xlm_roberta", "XLMRobertaTokenizer"),
}
_TOKENIZER_FILES = ("*.json", "*.jinja", "tokenizer*", "*.tiktoken", "*.model", "*.txt")
_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)  # what a wrong tokenizer.json raises


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


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder or .gguf file. Raises ModelPathError where none can be loaded."""
    if is_gguf(folder):
        return _load_gguf(folder)
    try:
        known = _known_class(folder)
        if known is not None:
            return known.from_pretrained(folder)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, *_MALFORMED) as error:
        if not (folder / "tokenizer.json").is_file():
            raise ModelPathError(
                f"{folder} holds no tokenizer that can be loaded: put the model's tokenizer.json and "
                f"tokenizer_config.json beside config.json."
            ) from error
        reason = " ".join(str(error).split())
        raise ModelPathError(
            f"{folder} holds no tokenizer that can be loaded: {reason}. Fetch tokenizer.json and "
            f"tokenizer_config.json again."
        ) from error


def _known_class(folder: Path) -> Any:
    """The class that AutoTokenizer would choose, where that is known without it; else None."""
    settings = read_json(folder / "tokenizer_config.json")
    if not (folder / "tokenizer.json").is_file() or "auto_map" in settings:
        return None
    name = settings.get("tokenizer_class")
    if name in _GENERIC_CLASSES:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    package, own = CLASS_OF.get(read_json(folder / "config.json").get("model_type", ""), ("", ""))
    if not own or name not in (own, f"{own}Fast"):
        return None
    return getattr(import_module(f"transformers.models.{package}.tokenization_{package}"), own)


def _load_gguf(path: Path) -> Any:
    """The tokenizer that a .gguf file holds."""
    from transformers import PreTrainedTokenizerFast

    from max_ray.gguf.tokenizer import build_tokenizer

    built = build_tokenizer(read_gguf(path))
    others = [token for token in built.control_tokens if token not in built.names.values()]
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=built.tokenizer,
        chat_template=built.chat_template,
        additional_special_tokens=others,
        clean_up_tokenization_spaces=False,
        **built.names,
    )

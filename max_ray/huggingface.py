"""Hugging Face's files as plain JSON: config.json, generation_config.json; and a model path or repository id as a
local folder. No transformers here: model configurations need attributes, not its classes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from max_ray.errors import ConfigError, ModelPathError, nearest
from max_ray.gguf import huggingface_values, lone_gguf, read_gguf
from max_ray.hub import is_repository, local_copy
from max_ray.quantization_files import quantization_settings

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
)
_POSITIVE = ("rms_norm_eps", "rope_theta", "factor", "partial_rotary_factor")


class MissingKeyError(ConfigError, AttributeError):
    """config.json lacks a key; an AttributeError too, so that `hasattr` and `getattr` with a default work."""


class HuggingFaceConfig(Mapping[str, Any]):
    """config.json, immutable, by attribute (`cfg.hidden_size`) or as a mapping (`cfg.get("head_dim")`).

    A nested object is a HuggingFaceConfig too. A missing key raises MissingKeyError that names key and file.
    """

    __slots__ = ("_path", "_values")

    def __init__(self, values: Mapping[str, Any], path: str = "config.json") -> None:
        object.__setattr__(self, "_path", path)
        object.__setattr__(
            self,
            "_values",
            {k: _nested(v, f"{path}: {k}") for k, v in values.items()},
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy, pickle and inspect ask for these
            raise AttributeError(name)
        try:
            return self._values[name]
        except KeyError:
            raise MissingKeyError(f"{self._path} has no {name!r}.{nearest(name, self._values)}") from None

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"config.json is read-only: {name} was not set.")

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"HuggingFaceConfig({self.to_dict()!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return (HuggingFaceConfig, (self.to_dict(), self._path))

    def to_dict(self) -> dict[str, Any]:
        """The JSON values again."""
        return {k: v.to_dict() if isinstance(v, HuggingFaceConfig) else v for k, v in self._values.items()}

    @property
    def place(self) -> str:
        """The file, and the key in it, for messages."""
        return str(self._path)

    @property
    def text_part(self) -> HuggingFaceConfig:
        """What describes the text model: multimodal models nest it in `text_config`, all others are it."""
        nested = self._values.get("text_config")
        return nested if isinstance(nested, HuggingFaceConfig) else self

    @property
    def architecture_names(self) -> list[str]:
        """`architectures`; empty when there is none. Raises ConfigError when it is no list of names."""
        names = self._values.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{self._path}: 'architectures' must be a list of class names, not {names!r}.")
        return names

    def eos_token_ids(self, generation_config: Mapping[str, Any] | None = None) -> frozenset[int]:
        """Ids that end a text: generation_config.json's, else config.json's; one id or a list there."""
        given = (generation_config or {}).get("eos_token_id")
        given = self._values.get("eos_token_id") if given is None else given
        if given is None:
            return frozenset()
        return frozenset(given if isinstance(given, list) else [given])


def _nested(value: Any, place: str) -> Any:
    if isinstance(value, HuggingFaceConfig) or not isinstance(value, Mapping):
        return value
    return HuggingFaceConfig(value, place)


def load_huggingface_config(path: str | Path) -> HuggingFaceConfig:
    """config.json of a local model folder, or what a .gguf file says in its place. Settings of quantized weights that
    lie beside it (`quantization_files`) are its `quantization_config`. Raises ModelPathError (no such file),
    ConfigError (not JSON, or a number that no network can have), WeightsError (a damaged .gguf file)."""
    if Path(path).suffix == ".gguf":
        values = huggingface_values(read_gguf(path))
        _check_values(values, str(path))
        return HuggingFaceConfig(values, str(path))
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ModelPathError(f"There is no config.json in {path}: give the folder of a model in Hugging Face's layout.")
    values = read_json(file)
    _check_values(values, str(file))
    found = quantization_settings(values, Path(path), read_json)
    values.pop("quantization_config", None)
    if found is not None:
        values["quantization_config"] = HuggingFaceConfig(*found)
    return HuggingFaceConfig(values, str(file))


def _check_values(values: Mapping[str, Any], place: str) -> None:
    """The usual names, where they are there and not null: a wrong value would fail somewhere inside the network."""
    _check_numbers(values, place)
    for name in ("rope_scaling", "rope_parameters"):
        nested = values.get(name)
        if nested is not None and not isinstance(nested, Mapping):
            raise ConfigError(f"{place}: {name!r} must be an object or null, not {nested!r}.")
        _check_numbers(nested or {}, f"{place}: {name}")


def _check_numbers(values: Mapping[str, Any], place: str) -> None:
    for name, value in values.items():
        if name in _COUNTS and value is not None and not (_is_count(value) or _is_per_layer(name, value)):
            raise ConfigError(f"{place}: {name!r} must be a positive integer, not {value!r}.")
        if name in _POSITIVE and value is not None and not _is_positive(value):
            raise ConfigError(f"{place}: {name!r} must be a positive number, not {value!r}.")


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_per_layer(name: str, value: object) -> bool:
    """A width for each layer, as some networks have it (Gemma 3n)."""
    return name == "intermediate_size" and isinstance(value, list) and all(_is_count(width) for width in value)


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 1e18  # type: ignore[operator]


def required(huggingface_config: Any, name: str) -> Any:
    """A value of config.json that the model cannot do without. Raises ConfigError naming it, also where it is a list
    with a value for each layer."""
    value = _given(huggingface_config, name)
    if isinstance(value, list):
        raise ConfigError(f"config.json has a {name!r} for each layer; this model family has one for all.")
    return value


def required_list(huggingface_config: Any, name: str) -> list[Any]:
    """A list of config.json that the model cannot do without. Raises ConfigError naming it."""
    value = _given(huggingface_config, name)
    if not isinstance(value, list):
        raise ConfigError(f"config.json has {name}={value!r}, which is no list.")
    return value


def _given(huggingface_config: Any, name: str) -> Any:
    value = huggingface_config.get(name)
    if value is None:
        raise ConfigError(f"config.json has no {name!r}; this model family needs it.")
    return value


def head_dim(huggingface_config: Any) -> int:
    """Size of one attention head: `head_dim`, by default hidden_size / num_attention_heads."""
    given = huggingface_config.get("head_dim")
    return int(
        given or required(huggingface_config, "hidden_size") // required(huggingface_config, "num_attention_heads")
    )


def load_generation_config(path: str | Path) -> dict[str, Any]:
    """generation_config.json of a local model folder; empty when there is none. Raises ConfigError (not JSON)."""
    file = Path(path) / "generation_config.json"
    values: dict[str, Any] = read_json(file) if file.is_file() else {}
    return values


def resolve_model_path(model_path: str | Path, revision: str | None = None) -> Path:
    """The absolute local path of a model: its folder, a lone .gguf file, or the snapshot of a Hugging Face repository.

    A folder without config.json that holds one GGUF model stands for that file; for repositories see `hub`.
    Raises ModelPathError for no such folder, another kind of file, no config.json, and a repository that cannot be had.
    """
    path = Path(model_path).expanduser().absolute()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (lone := lone_gguf(path)) is not None:
                return lone
            raise ModelPathError(
                f"There is no config.json in {model_path}: give the folder of a model in Hugging Face's layout."
            )
        if revision is not None:
            raise ModelPathError(
                f"revision={revision!r} has no meaning for the local folder {model_path}: leave it out."
            )
        return path
    if path.exists():
        raise ModelPathError(
            f"{model_path} is a file: give a .gguf file, or the folder that holds config.json and the weights."
        )
    if path.suffix == ".gguf" and path.parent.is_dir():
        raise ModelPathError(f"There is no file {model_path}.")
    if not is_repository(str(model_path)):
        raise ModelPathError(
            f"There is no folder {model_path}: give an existing folder or a Hugging Face repository id."
        )
    folder, colon, _ = str(model_path).partition(":")
    if colon and Path(folder).is_dir():
        raise ModelPathError(
            f"{folder} is a local folder, and {model_path} names a model of a hub repository: give the file."
        )
    return local_copy(str(model_path), revision)


def read_json(file: Path, kind: type[Any] = dict) -> Any:
    """The object (or with `kind`, the list) in a JSON file. Raises ConfigError where it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}.") from None
    if not isinstance(content, kind):
        raise ConfigError(f"{file} must hold a JSON {'object' if kind is dict else 'list'}.")
    return content

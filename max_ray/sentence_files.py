"""The files beside config.json that say how token vectors become a text's vector: the sentence-transformers layout.

    modules.json                          the stages, in order: Transformer, Pooling, Dense, Normalize
    <pooling>/config.json                 pooling_mode_*: true, or "pooling_mode": "mean"
    <dense>/config.json                   in_features, out_features, bias, activation_function
    sentence_bert_config.json             max_seq_length (special tokens included), do_lower_case; older models have
                                          the name of their family in place of "bert"
    config_sentence_transformers.json     prompts, default_prompt_name, truncate_dim

Without modules.json the family's own pooling holds, and nothing is normalized. No torch: the HTTP replica reads these.

A GGUF file says the pooling (`{arch}.pooling_type`) and no more: its vectors are scaled to length 1, as llama.cpp's
server does it. Later stages and prompts are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from max_ray.errors import ConfigError
from max_ray.gguf import read_gguf
from max_ray.huggingface import read_json

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""In the order in which several pooled vectors are joined."""

ACTIVATIONS = ("Identity", "Tanh", "GELU", "ReLU", "SiLU", "Sigmoid")
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

_NO_POOLING = 0
_GGUF_POOLING = {1: "mean", 2: "cls", 3: "lasttoken"}


@dataclass(frozen=True)
class DenseStage:
    """A linear layer after the pooling; its weights are in `folder` of the model. activation: one of ACTIVATIONS."""

    folder: str
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True)
class SentenceFiles:
    """What the files say. pooling: of POOLING_MODES, one or several to be joined.

    normalize: whether the vector is scaled to length 1 at the end. max_seq_length: None where they do not say.
    default_prompt: text to put before every input; "" for none. truncate_dim: how many numbers of the vector are kept,
    after all stages, so that it is not scaled again; None for all.
    """

    pooling: tuple[str, ...]
    normalize: bool = False
    dense: tuple[DenseStage, ...] = ()
    max_seq_length: int | None = None
    lower_case: bool = False
    default_prompt: str = ""
    truncate_dim: int | None = None

    def embedding_size(self, hidden_size: int) -> int:
        """Length of the vector of a model with this hidden size."""
        size = self.dense[-1].out_features if self.dense else hidden_size * len(self.pooling)
        return size if self.truncate_dim is None else min(size, self.truncate_dim)

    @classmethod
    def read(cls, folder: Path, default_pooling: str) -> SentenceFiles:
        """Raises ConfigError for a stage or a pooling that is not supported, and for files that contradict."""
        if folder.suffix == ".gguf":
            return cls(pooling=(_gguf_pooling(folder) or default_pooling,), normalize=True)
        encoder = _encoder_file(folder)
        file = folder / "config_sentence_transformers.json"
        prompt, prompt_name = _default_prompt(file)
        files = cls(
            pooling=(default_pooling,),
            max_seq_length=_count(
                encoder.get("max_seq_length"), folder / "sentence_bert_config.json", "max_seq_length"
            ),
            lower_case=bool(encoder.get("do_lower_case")),
            default_prompt=prompt,
            truncate_dim=_count(_object(file).get("truncate_dim"), file, "truncate_dim"),
        )
        if not has_sentence_files(folder):
            return files
        stages = [_stage(entry, folder) for entry in read_json(folder / "modules.json", list)]
        return _with_stages(files, stages, folder, prompt_name)


def score_activation(folder: Path) -> str:
    """What a cross-encoder's files put behind its one number: `Sigmoid`, where they do not say, or `Identity`.

    Raises ConfigError for another function.
    """
    config, more = read_json(folder / "config.json"), _object(folder / "config_sentence_transformers.json")
    nested = config.get("sentence_transformers") or {}
    given = (
        more.get("activation_fn") or nested.get("activation_fn") or config.get("sbert_ce_default_activation_function")
    )
    name = str(given or "Sigmoid").rpartition(".")[2]
    if name not in ("Sigmoid", "Identity"):
        raise ConfigError(f"{folder}: the activation {name!r} of scores is not supported; Sigmoid and Identity are.")
    return name


def has_sentence_files(folder: Path) -> bool:
    """Whether a folder holds a model in the sentence-transformers layout, or a GGUF file says how tokens are pooled."""
    if folder.suffix == ".gguf":
        return _gguf_pooling(folder) is not None
    return (folder / "modules.json").is_file()


def _gguf_pooling(path: Path) -> str | None:
    """The pooling that a GGUF file names; None where it names none. Raises ConfigError for one of scores."""
    file = read_gguf(path)
    number = file.metadata.get(f"{file.architecture}.pooling_type")
    if number in (None, _NO_POOLING):
        return None
    if number not in _GGUF_POOLING:
        raise ConfigError(
            f"{path}: pooling_type is {number!r}; mean (1), cls (2) and last (3) can be read from GGUF. Scores (4) "
            f"need the model's safetensors folder."
        )
    return _GGUF_POOLING[number]


def _encoder_file(folder: Path) -> dict[str, Any]:
    files = (folder / f"sentence_{family}_config.json" for family in ("bert", "roberta", "xlm-roberta"))
    return next((read_json(file) for file in files if file.is_file()), {})


def _with_stages(
    files: SentenceFiles, stages: list[tuple[str, str]], folder: Path, prompt_name: str | None
) -> SentenceFiles:
    """The stages of modules.json, which come in the order Transformer, Pooling, Dense, Normalize."""
    order = [kind for kind, _ in stages]
    ranks = [("Transformer", "Pooling", "Dense", "Normalize").index(kind) for kind in order]
    if ranks != sorted(ranks) or order.count("Transformer") != 1 or order.count("Pooling") != 1:
        raise ConfigError(
            f"{folder / 'modules.json'} has the stages {', '.join(order)}; supported is one Transformer, one Pooling, "
            "then Dense and Normalize in this order."
        )
    by_kind = {kind: folder / path for kind, path in stages}
    pooling = read_json(by_kind["Pooling"] / "config.json")
    if prompt_name is not None and not pooling.get("include_prompt", True):
        raise ConfigError(
            f"{folder}: its pooling leaves out the tokens of the prompt (include_prompt=false) and prompt "
            f"{prompt_name!r} is put before every text; that is not supported."
        )
    return replace(
        files,
        pooling=_pooling(pooling, by_kind["Pooling"]),
        normalize="Normalize" in by_kind,
        dense=tuple(_dense(folder, path) for kind, path in stages if kind == "Dense"),
    )


def _stage(entry: Any, folder: Path) -> tuple[str, str]:
    """(kind, path): the class name is what counts, its module has moved from release to release."""
    kind = str(entry.get("type", "")).rpartition(".")[2] if isinstance(entry, Mapping) else ""
    if kind not in ("Transformer", "Pooling", "Dense", "Normalize"):
        raise ConfigError(
            f"{folder / 'modules.json'} has the stage {entry!r}; supported are Transformer, Pooling, Dense, Normalize."
        )
    return kind, str(entry.get("path", ""))


def _pooling(config: Mapping[str, Any], place: Path) -> tuple[str, ...]:
    """Old files have a flag a mode, newer ones `pooling_mode`, one name or several joined by "+" or in a list."""
    named = config.get("pooling_mode")
    if named is not None:
        wanted = set(named.split("+") if isinstance(named, str) else named)
    else:
        flags = {name for name, value in config.items() if name.startswith("pooling_mode_") and value}
        wanted = {_POOLING_FLAGS.get(flag, flag) for flag in flags}
    unknown = sorted(wanted - set(POOLING_MODES))
    if unknown or not wanted:
        raise ConfigError(
            f"{place / 'config.json'} asks for the pooling {', '.join(unknown) or 'of nothing'}; "
            f"supported are {', '.join(POOLING_MODES)}."
        )
    return tuple(mode for mode in POOLING_MODES if mode in wanted)


def _dense(folder: Path, path: str) -> DenseStage:
    config = read_json(folder / path / "config.json")
    activation = str(config.get("activation_function") or "Identity").rpartition(".")[2]
    sizes = [config.get("in_features"), config.get("out_features")]
    if activation not in ACTIVATIONS or not all(type(size) is int and size > 0 for size in sizes):
        raise ConfigError(
            f"{folder / path / 'config.json'}: a dense stage from {sizes[0]!r} to {sizes[1]!r} numbers with activation "
            f"{activation!r} is not supported. Activations that are: {', '.join(ACTIVATIONS)}."
        )
    return DenseStage(path, int(sizes[0] or 0), int(sizes[1] or 0), bool(config.get("bias", True)), activation)


def _default_prompt(file: Path) -> tuple[str, str | None]:
    """(the text before every input, its name)."""
    config = _object(file)
    name, prompts = config.get("default_prompt_name"), config.get("prompts") or {}
    if name is None:
        return "", None
    if name not in prompts:
        raise ConfigError(f"{file}: default_prompt_name is {name!r}, which is not among its prompts.")
    return str(prompts[name]), str(name)


def _count(value: Any, file: Path, name: str) -> int | None:
    if value is not None and not (type(value) is int and value > 0):
        raise ConfigError(f"{file}: {name} must be a positive integer, not {value!r}.")
    return value


def _object(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}

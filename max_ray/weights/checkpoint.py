"""open_weights: finds the files of a checkpoint folder and presents them as one WeightSource. No torch before reading.

What is read, in this order of preference: a file given by name; `model.safetensors`; the shards named by
`model.safetensors.index.json`; every `*.safetensors` of the folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from max_ray.errors import ModelPathError, WeightsError
from max_ray.gguf import lone_gguf, read_gguf
from max_ray.interfaces.encoding import WeightsFormat
from max_ray.weights.gguf_fused_experts import FusedExpertsGguf
from max_ray.weights.gguf_latent import LatentGguf
from max_ray.weights.gguf_source import GgufSource
from max_ray.weights.safetensors_header import TensorEntry, read_header
from max_ray.weights.source import WeightSource, no_such_tensor

if TYPE_CHECKING:
    import torch

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"(?P<stem>.+)-\d+-of-(?P<total>\d+)\.safetensors")
_OF_GGUF = {"deepseek2": LatentGguf, "gpt-oss": FusedExpertsGguf}
_LAYER = re.compile(r".*layers\.\d+\.")
_PREDICTOR = re.compile(r"(?P<layer>.*layers\.\d+\.)eh_proj\..*")
_PREDICTORS = re.compile(r"(model\.)?mtp(_layers)?\..*")
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}


def open_weights(
    path: str | Path, format: WeightsFormat | None = None, *, keep_quantized: bool = False
) -> WeightSource:
    """Opens the checkpoint in a folder, or one weights file; reads headers only.

    format: the wanted format; None takes what is there.
    keep_quantized: quantized tensors are offered as codes and scales; otherwise they are dequantized as they are read.
    Raises ModelPathError when there is nothing to load, WeightsError when the files cannot be used.
    """
    path = Path(path)
    if not path.exists():
        raise ModelPathError(f"{path} does not exist. Give the folder of a checkpoint, a .safetensors or .gguf file.")
    if format is WeightsFormat.gguf or path.suffix == ".gguf":
        file = read_gguf(_gguf_file(path))
        kind = _OF_GGUF.get(str(file.metadata.get("general.architecture")), GgufSource)
        return kind(file, keep_quantized=keep_quantized)
    if path.is_file():
        return _open_file(path)
    if (path / _SINGLE_FILE).is_file():
        return SafetensorsSource([path / _SINGLE_FILE])
    if (path / _INDEX_FILE).is_file():
        return SafetensorsSource.from_index(path / _INDEX_FILE)
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if not files:
        raise _nothing_to_load(path)
    _check_all_shards_present(path, files)
    return SafetensorsSource(files)


class SafetensorsSource(WeightSource):
    """The tensors of one or several safetensors files. Holds no open file, so it may be pickled and shared."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Raises WeightsError for a damaged file, or a tensor that two files have."""
        self._entries: dict[str, TensorEntry] = {}
        self._predictors: frozenset[str] | None = None
        for file in files:
            for name, entry in read_header(file).items():
                if name in self._entries:
                    raise WeightsError(
                        f"Tensor {name!r} is in two files, {self._entries[name].path} and {file}. "
                        f"Remove the file that is not part of this checkpoint."
                    )
                self._entries[name] = entry

    @classmethod
    def from_index(cls, index: Path) -> SafetensorsSource:
        """The shards that an index names, with the tensors it lists and no others.

        Raises WeightsError when a shard is missing or lacks a tensor that the index places in it.
        """
        weight_map = _read_weight_map(index)
        shards = {shard: read_header(index.parent / shard) for shard in dict.fromkeys(weight_map.values())}
        for name, shard in weight_map.items():
            if name not in shards[shard]:
                raise WeightsError(f"{index} places tensor {name!r} in {shard}, which does not have it.")
        source = cls([])
        source._entries = {
            name: entry
            for shard, file in shards.items()
            for name, entry in file.items()
            if weight_map.get(name) == shard
        }
        return source

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        from max_ray.weights.safetensors_file import DTYPES

        return DTYPES[self._entry(name).dtype]

    def tensor_bytes(self, name: str) -> int:
        return self._entry(name).nbytes

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        from max_ray.weights.safetensors_file import read_slice

        return read_slice(self._entry(name), axis, start, stop)

    def file_entry(self, name: str) -> TensorEntry:
        return self._entry(name)

    def adds_nothing(self, name: str) -> bool:
        """Of layers that predict tokens further ahead than the next one: they come after all others, and what they give
        changes nothing in the next token. DeepSeek's and GLM's have an `eh_proj`."""
        if self._predictors is None:
            found = (_PREDICTOR.fullmatch(other) for other in self._entries)
            self._predictors = frozenset(match["layer"] for match in found if match)
        layer = _LAYER.match(name)
        return (layer is not None and layer[0] in self._predictors) or _PREDICTORS.fullmatch(name) is not None

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise no_such_tensor(name, self._entries)
        return self._entries[name]


def _gguf_file(path: Path) -> Path:
    """The .gguf file itself, or the one in the folder."""
    if path.is_file():
        return path
    lone = lone_gguf(path)
    if lone is None:
        raise ModelPathError(f"{path} has no .gguf file in it.")
    return lone


def _open_file(path: Path) -> WeightSource:
    if path.suffix == ".safetensors":
        return SafetensorsSource([path])
    if path.name == _INDEX_FILE:
        return SafetensorsSource.from_index(path)
    if path.suffix in _PICKLE_SUFFIXES:
        raise _pickled(path)
    raise WeightsError(
        f"{path} is not a weights file. Give a .safetensors or .gguf file, or the folder of a checkpoint."
    )


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index} is not a checkpoint index: it must be JSON with a weight_map.") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: weight_map is not a table of tensor names and files.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_below(shard):
            raise WeightsError(f"{index} places tensor {name!r} in {shard!r}, which is no file of its folder.")
        if not (index.parent / shard).is_file():
            raise WeightsError(f"{index} names {shard} (for tensor {name!r}), but there is no such file beside it.")
    return weight_map


def _is_below(shard: str) -> bool:
    """Whether a name leads to a file of the folder itself or of one in it."""
    path = PurePosixPath(shard)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and "\\" not in shard


def _check_all_shards_present(folder: Path, files: list[Path]) -> None:
    """Without an index, the names alone say how many shards there should be."""
    found: dict[tuple[str, int], int] = {}
    for file in files:
        if match := _SHARD_NAME.fullmatch(file.name):
            key = (match["stem"], int(match["total"]))
            found[key] = found.get(key, 0) + 1
    for (stem, total), count in found.items():
        if count != total:
            raise WeightsError(
                f"{folder} has {count} of the {total} files {stem}-*-of-*.safetensors. Fetch the others."
            )


def _nothing_to_load(folder: Path) -> WeightsError | ModelPathError:
    for file in sorted(folder.iterdir()):
        if file.suffix in _PICKLE_SUFFIXES:
            return _pickled(file)
        if file.suffix == ".gguf":
            return ModelPathError(f"{folder} has no *.safetensors file, but {file.name}: give the path of that file.")
    return ModelPathError(f"{folder} has no weights: there is no *.safetensors file in it.")


def _pickled(path: Path) -> WeightsError:
    return WeightsError(
        f"{path} is a pickle, which can run code when it is loaded, so it is not read. Convert the checkpoint with "
        f"transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), which writes "
        f"safetensors."
    )

"""The text network of a multimodal checkpoint: its tensors under the names that it has where it stands alone.

Layouts of `transformers`: `language_model.model.layers.0..` before 4.52, `model.language_model.layers.0..` since. A
tensor that is neither of the text network nor of a known tower keeps its name, so that loading finds it left over.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from max_ray.errors import WeightsError
from max_ray.weights.source import WeightSource, no_such_tensor

if TYPE_CHECKING:
    import torch

    from max_ray.weights.quantized import QuantizedRows
    from max_ray.weights.safetensors_header import TensorEntry

_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
}
_TOWERS = (
    *("vision_tower", "vision_model", "visual", "audio_tower", "multi_modal_projector", "mm_projector"),
    *("vision_projection", "embed_vision", "embed_audio", "connector", "image_newline", "vision_encoder"),
)
_TOWER = re.compile(rf"(model\.)?({'|'.join(_TOWERS)})(\..*)?")


class TextPart(WeightSource):
    """Of the checkpoint `source`, the text network. towers: names of the tensors that are left out."""

    def __init__(self, source: WeightSource) -> None:
        """Raises WeightsError where two tensors have the same name in the text network."""
        self._source = source
        self._stored: dict[str, str] = {}
        self.towers: list[str] = []
        for name in source.names():
            if _TOWER.fullmatch(name):
                self.towers.append(name)
                continue
            other = self._stored.setdefault(text_name(name), name)
            if other != name:
                raise WeightsError(f"{other} and {name} are the same weight of the text network ({text_name(name)}).")

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._name(name))

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._name(name))

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        return self._source.get_slice(self._name(name), axis, start, stop)

    def quantization(self, name: str) -> str:
        return self._source.quantization(self._name(name))

    def check_columns(self, name: str, columns: range) -> None:
        self._source.check_columns(self._name(name), columns)

    def get_quantized(self, name: str, rows: range, columns: range) -> QuantizedRows:
        return self._source.get_quantized(self._name(name), rows, columns)

    def block_type(self, name: str) -> str:
        return self._source.block_type(self._name(name))

    def get_blocks(self, name: str, rows: range, columns: range, buffer: torch.Tensor | None = None) -> torch.Tensor:
        return self._source.get_blocks(self._name(name), rows, columns, buffer)

    def block_place(self, name: str, rows: range, columns: range) -> tuple[str, int, int, int] | None:
        return self._source.block_place(self._name(name), rows, columns)

    def file_entry(self, name: str) -> TensorEntry | None:
        return self._source.file_entry(self._name(name))

    def adds_nothing(self, name: str) -> bool:
        return self._source.adds_nothing(self._name(name))

    def packed_bits(self, name: str) -> float:
        return self._source.packed_bits(self._name(name))

    def tensor_bytes(self, name: str) -> int:
        return self._source.tensor_bytes(self._name(name))

    def _name(self, name: str) -> str:
        if name not in self._stored:
            raise no_such_tensor(name, self._stored)
        return self._stored[name]


def text_name(name: str) -> str:
    """The name that a tensor of a multimodal checkpoint has in the text network alone."""
    for theirs, own in _PREFIXES.items():
        if name.startswith(theirs):
            return own + name.removeprefix(theirs)
    return name

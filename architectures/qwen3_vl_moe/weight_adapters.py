"""Names of Qwen3-VL mixture-of-experts weights, and the experts of a layer taken apart: a checkpoint stores them as two
tensors, the network has them one by one.

`{}` is the layer, then the expert; `:q` a part of a fused weight.
"""

from __future__ import annotations

from typing import Any

import torch

from architectures.qwen3_vl.weight_adapters import text_table, vision_table
from max_ray.errors import WeightsError
from max_ray.weights import TensorEntry, WeightSource
from max_ray.weights.mapping import NameMap

_LAYER = "model.language_model.layers.{}"
_FUSED = {"experts.gate_up_proj": ("gate_proj", "up_proj"), "experts.down_proj": ("down_proj",)}


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names. The experts are found under both: as the checkpoint stores them (so that the
    memory plan counts them) and as UnfusedExperts gives them."""
    mlp = [
        (f"{_LAYER}.mlp.gate.weight", "layers.{}.mlp.router.weight"),
        (f"{_LAYER}.mlp.experts.gate_up_proj", "layers.{}.mlp.experts.gate_up"),
        (f"{_LAYER}.mlp.experts.down_proj", "layers.{}.mlp.experts.down"),
    ]
    for theirs, ours in (("", ""), (".experts.{}", ".experts.all.{}")):
        mlp += [
            (f"{_LAYER}.mlp{theirs}.gate_proj.weight", f"layers.{{}}.mlp{ours}.gate_up.weight:gate"),
            (f"{_LAYER}.mlp{theirs}.up_proj.weight", f"layers.{{}}.mlp{ours}.gate_up.weight:up"),
            (f"{_LAYER}.mlp{theirs}.down_proj.weight", f"layers.{{}}.mlp{ours}.down.weight"),
        ]
    return NameMap([*text_table(huggingface_config), *mlp, *vision_table()])


class UnfusedExperts(WeightSource):
    """A checkpoint in which the experts of a layer have names of their own: `experts.7.gate_proj.weight` [F, D],
    `up_proj` [F, D], `down_proj` [D, F].

    Fused tensors are [E, 2F, D] and [E, D, F], or, in the released checkpoints, with the last two axes exchanged; gate
    stands before up. Where both readings fit a shape, the first is taken, as by transformers. Raises WeightsError for a
    fused tensor of another shape.
    """

    def __init__(self, source: WeightSource, num_experts: int, dim: int, width: int) -> None:
        self._source = source
        self._dim, self._width = dim, width
        self._own: list[str] = []
        self._experts: dict[str, tuple[str, int, int, bool]] = {}  # name -> tensor, expert, first row, exchanged
        for name in source.names():
            kind = next((kind for kind in _FUSED if name.endswith(kind)), None)
            if kind is None:
                self._own.append(name)
            else:
                self._take_apart(name, kind, num_experts)

    def names(self) -> list[str]:
        return [*self._own, *self._experts]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._experts:
            return self._source.shape(name)
        return (self._dim, self._width) if name.endswith("down_proj.weight") else (self._width, self._dim)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._experts[name][0] if name in self._experts else name)

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """See WeightSource; of an expert, all of its fused tensor is read."""
        if name not in self._experts:
            return self._source.get_slice(name, axis, start, stop)
        tensor, expert, first, is_exchanged = self._experts[name]
        fused = self._source.get_slice(tensor, 0, expert, expert + 1)[0]
        rows = (fused.T if is_exchanged else fused).narrow(0, first, self.shape(name)[0])
        return rows.narrow(axis, start, stop - start)

    def file_entry(self, name: str) -> TensorEntry | None:
        return None if name in self._experts else self._source.file_entry(name)

    def _take_apart(self, tensor: str, kind: str, num_experts: int) -> None:
        parts = _FUSED[kind]
        wanted = (2 * self._width, self._dim) if len(parts) == 2 else (self._dim, self._width)
        shape = self._source.shape(tensor)
        if shape not in ((num_experts, *wanted), (num_experts, *reversed(wanted))):
            raise WeightsError(
                f"The shape of {tensor} is {list(shape)} in the checkpoint, the network wants "
                f"{[num_experts, *wanted]}, or the last two exchanged."
            )
        prefix = tensor.removesuffix(kind.removeprefix("experts"))
        for expert in range(num_experts):
            for number, part in enumerate(parts):
                place = (tensor, expert, number * self._width, shape[1:] != wanted)
                self._experts[f"{prefix}.{expert}.{part}.weight"] = place

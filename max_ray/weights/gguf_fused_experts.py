"""FusedExpertsGguf: a mixture's experts as gpt-oss's own checkpoints have them: all of a layer in one tensor.

With E experts, D hidden size and F width, llama.cpp's converter cuts and transposes

    gate_up_proj [E, D, 2F], gate and up columns alternating   ->   ffn_gate_exps [E, F, D], ffn_up_exps [E, F, D]
    down_proj [E, F, D]                                        ->   ffn_down_exps [E, D, F]

and likewise biases [E, 2F]. Here they are `ffn_gate_up_exps` and `ffn_down_exps` in the first form. Quantized ones are
dequantized as they are read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from max_ray.errors import WeightsError
from max_ray.gguf.file import GgufFile
from max_ray.weights.gguf_source import GgufSource

if TYPE_CHECKING:
    import torch

    from max_ray.weights.safetensors_header import TensorEntry

_EXPERT = re.compile(r"(?P<layer>blk\.\d+)\.ffn_(?P<which>gate|up|down)_exps\.((?P<number>\d+)\.weight|bias)")
_FUSED = re.compile(r"(?P<layer>blk\.\d+)\.ffn_(?P<which>gate_up|down)_exps\.(?P<kind>weight|bias)")


class FusedExpertsGguf(GgufSource):
    """Raises WeightsError for experts without one of their parts, or of unequal shapes."""

    def __init__(self, file: GgufFile, *, keep_quantized: bool = False) -> None:
        super().__init__(file, keep_quantized=keep_quantized)
        self._num_experts: dict[str, int] = {}
        plain = []
        for name in super().names():
            match = _EXPERT.fullmatch(name)
            if match is None:
                plain.append(name)
            elif match["number"]:
                self._num_experts[match["layer"]] = max(
                    self._num_experts.get(match["layer"], 0), int(match["number"]) + 1
                )
        kinds = [f"ffn_{which}_exps.{kind}" for which in ("gate_up", "down") for kind in ("weight", "bias")]
        self._fused = [f"{layer}.{kind}" for layer in self._num_experts for kind in kinds]
        self._shown = [*plain, *self._fused]
        for name in self._fused:
            self._check(name)

    def names(self) -> list[str]:
        return list(self._shown)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._fused:
            return super().shape(name)
        first = super().shape(self._parts(name, 0)[0])
        experts, times = self._num_experts[name.split(".ffn_")[0]], len(self._parts(name, 0))
        return (experts, first[1] * times) if name.endswith("bias") else (experts, first[1], first[0] * times)

    def dtype(self, name: str) -> torch.dtype:
        return super().dtype(self._parts(name, 0)[0] if name in self._fused else name)

    def tensor_bytes(self, name: str) -> int:
        if name not in self._fused:
            return super().tensor_bytes(name)
        numbers = range(1 if name.endswith("bias") else self._num_experts[name.split(".ffn_")[0]])
        return sum(super(FusedExpertsGguf, self).tensor_bytes(part) for i in numbers for part in self._parts(name, i))

    def quantization(self, name: str) -> str:
        return "" if name in self._fused else super().quantization(name)

    def file_entry(self, name: str) -> TensorEntry | None:
        return None if name in self._fused else super().file_entry(name)

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        if name not in self._fused:
            return super().get_slice(name, axis, start, stop)
        experts = range(start, stop) if axis == 0 else range(self.shape(name)[0])
        if name.endswith("bias"):
            num_experts = self.shape(name)[0]
            parts = [super(FusedExpertsGguf, self).get_slice(p, 0, 0, num_experts) for p in self._parts(name, 0)]
            return self._joined(parts).narrow(axis, start, stop - start)
        return self._weights(name, experts, axis, start, stop)

    def _weights(self, name: str, experts: range, axis: int, start: int, stop: int) -> torch.Tensor:
        """Experts one by one, of each the columns that are wanted."""
        import torch

        times, made = len(self._parts(name, 0)), []
        columns = range(start // times, -(-stop // times)) if axis == 2 else range(self.shape(name)[2] // times)
        for i in experts:
            parts = [super(FusedExpertsGguf, self).get_slice(part, 0, columns.start, columns.stop).T
                     for part in self._parts(name, i)]  # fmt: skip
            expert = self._joined(parts)
            if axis == 2:
                expert = expert[:, start - columns.start * times : stop - columns.start * times]
            made.append(expert[start:stop] if axis == 1 else expert)
        return torch.stack(made) if made else torch.empty(0, *self.shape(name)[1:], dtype=self.dtype(name))

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Last axes that alternate."""
        import torch

        return torch.stack(parts, dim=-1).flatten(-2)

    def _parts(self, name: str, expert: int) -> list[str]:
        """The file's own tensors that make a fused one: of one expert, or the biases of all."""
        match = _FUSED.fullmatch(name)
        assert match is not None, name
        end = "bias" if match["kind"] == "bias" else f"{expert}.weight"
        return [f"{match['layer']}.ffn_{which}_exps.{end}" for which in match["which"].split("_")]

    def _check(self, name: str) -> None:
        numbers = range(1 if name.endswith("bias") else self._num_experts[name.split(".ffn_")[0]])
        shapes = {super(FusedExpertsGguf, self).shape(part) for i in numbers for part in self._parts(name, i)}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise WeightsError(f"{self._file.path}: the parts of {name} have the shapes {sorted(shapes)}.")

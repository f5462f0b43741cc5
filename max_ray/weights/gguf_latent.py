"""LatentGguf: the up-projections of latent attention as DeepSeek's own checkpoints have them.

llama.cpp's converter cuts `kv_b_proj` [H * (P + V), L] (H heads, P and V widths of a key's plain part and of a value, L
of the latent) in two, by head, and transposes the first half:

    attn_k_b [H, L, P]     attn_v_b [H, V, L]

Older files have it whole, as attn_kv_b; of files that have both, the whole one is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from max_ray.errors import WeightsError
from max_ray.gguf.file import GgufFile
from max_ray.weights.gguf_source import GgufSource

if TYPE_CHECKING:
    import torch

    from max_ray.weights.safetensors_header import TensorEntry

_KEYS, _VALUES, _WHOLE = "attn_k_b.weight", "attn_v_b.weight", "attn_kv_b.weight"


class LatentGguf(GgufSource):
    """Raises WeightsError where the two halves do not belong together."""

    def __init__(self, file: GgufFile, *, keep_quantized: bool = False) -> None:
        super().__init__(file, keep_quantized=keep_quantized)
        found = super().names()
        stems = [name.removesuffix(_KEYS) for name in found if name.endswith(_KEYS)]
        self._heads = file.metadata.get(f"{file.architecture}.attention.head_count")
        self._joined = {stem + _WHOLE: stem for stem in stems if stem + _WHOLE not in found}
        hidden = {stem + half for stem in stems for half in (_KEYS, _VALUES)}
        self._shown = [*(name for name in found if name not in hidden), *self._joined]
        for name in self._joined:
            self._sizes(name)

    def names(self) -> list[str]:
        return list(self._shown)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._joined:
            return super().shape(name)
        heads, latent, plain, value = self._sizes(name)
        return heads * (plain + value), latent

    def dtype(self, name: str) -> torch.dtype:
        import torch

        return torch.float32 if name in self._joined else super().dtype(name)

    def tensor_bytes(self, name: str) -> int:
        if name not in self._joined:
            return super().tensor_bytes(name)
        return sum(super(LatentGguf, self).tensor_bytes(self._joined[name] + half) for half in (_KEYS, _VALUES))

    def quantization(self, name: str) -> str:
        return "" if name in self._joined else super().quantization(name)

    def file_entry(self, name: str) -> TensorEntry | None:
        return None if name in self._joined else super().file_entry(name)

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        if name not in self._joined:
            return super().get_slice(name, axis, start, stop)
        if axis == 1:
            return self.get(name)[:, start:stop]
        size = self.shape(name)[0] // self._sizes(name)[0]
        first, last = start // size, -(-stop // size)
        return self._heads_of(name, first, last)[start - first * size : stop - first * size]

    def _heads_of(self, name: str, first: int, last: int) -> torch.Tensor:
        """[heads * (P + V), L] of the heads [first, last)."""
        import torch

        _, latent, plain, value = self._sizes(name)
        stem = self._joined[name]
        keys = super().get_slice(stem + _KEYS, 0, first * latent, last * latent)
        values = super().get_slice(stem + _VALUES, 0, first * value, last * value)
        by_head = keys.float().view(-1, latent, plain).transpose(1, 2), values.float().view(-1, value, latent)
        return torch.cat(by_head, dim=1).flatten(0, 1)

    def _sizes(self, name: str) -> tuple[int, int, int, int]:
        """H, L, P, V."""
        stem, heads = self._joined[name], self._heads
        key_rows, plain = super().shape(stem + _KEYS)
        value_rows, latent = super().shape(stem + _VALUES)
        if type(heads) is not int or heads < 1 or key_rows != heads * latent or value_rows % heads:
            shapes = f"{[key_rows, plain]} and {[value_rows, latent]}"
            raise WeightsError(f"{self._file.path}: {stem}{_KEYS} and {_VALUES} have {shapes} for {heads!r} heads.")
        return heads, latent, plain, value_rows // heads

"""The Qwen3-VL network (Qwen Team 2025): a Qwen3 whose image tokens are embedded by a vision tower, turned by three
positions, and get more features of the tower after each of the first layers (deepstack, Meng et al. 2024).

Axes: T new tokens of a ragged batch, M image tokens among them, N tokens whose logits are wanted, D hidden size,
R rotated width, S features of an image token (its embedding, then deepstack's), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from architectures.qwen3_vl.model_config import VisionConfig
from architectures.qwen3_vl.vision import VisionTower
from max_ray import kernels
from max_ray.distributed import TPGroup
from max_ray.nn import ForwardBatch, Module, Transformer
from max_ray.nn.transformer import TransformerConfig


@dataclass(frozen=True)
class ImageTokens:
    """positions: int64 [T, 3], of all tokens: time, row and column. indices: int64 [M], which tokens are an image's.
    features: [S, M, D]."""

    positions: torch.Tensor
    indices: torch.Tensor
    features: torch.Tensor


class VisionTransformer(Transformer):
    """A Transformer with a vision tower beside it. Without images it is the Transformer that it is made from.

    section: how many pairs of a head turn with time, row and column; they are interleaved.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layers: Sequence[Module],
        vision: VisionConfig,
        section: tuple[int, int, int],
        max_length: int,
        tp: TPGroup,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(config, layers, max_length, tp, dtype)
        self.visual = VisionTower(vision, dtype, tp.device)
        self._axis_of_value = axis_of_pair(section, config.rope.dim // 2).repeat(2).to(tp.device)  # [R]

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """See Transformer. With images (`batch.images` is an ImageTokens), `batch.positions` is not used."""
        images: ImageTokens | None = batch.images
        if images is None:
            return super().forward(batch)
        assert self.rotary.cos_sin_cache is not None, "dynamic rope has no three positions"
        assert self.rotary.long_cos_sin_cache is None, "nor has longrope"
        places = images.positions[:, self._axis_of_value]  # [T, R]
        batch.cos_sin = self.rotary.cos_sin_cache.gather(0, places)
        x = self.embed_tokens(batch.tokens).index_copy(0, images.indices, images.features[0])
        residual: torch.Tensor = x.new_zeros(())
        for number, layer in enumerate(self.layers):
            x, residual = layer(x, residual if number else None, batch)
            if number + 1 < len(images.features):
                seen = x.index_select(0, images.indices) + images.features[number + 1]
                x = x.index_copy(0, images.indices, seen)
        x, _ = self.norm.add_and_norm(*(kernels.gather_rows(part, batch.logit_indices) for part in (x, residual)))
        logits: torch.Tensor = self.lm_head(x)
        return logits


def axis_of_pair(section: tuple[int, int, int], num_pairs: int) -> torch.Tensor:
    """int64 [num_pairs]: whether a pair turns with time (0), row (1) or column (2). Rows take every third pair from the
    second on, columns from the third on, as many as `section` says; the rest is time."""
    axes = torch.zeros(num_pairs, dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes

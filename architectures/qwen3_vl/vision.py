"""The vision tower of Qwen3-VL (Qwen Team 2025): a transformer over the patches of each image.

Axes: P patches of all images one after another, M = P / merge_size^2 tokens that they become, E hidden size of the
tower, D hidden size of the text model, H heads, S features of a token (its embedding, then deepstack's).

The patches of an image come in blocks of merge_size x merge_size, blocks row by row, so that neighbours of a block are
neighbours in memory. All ranks compute the whole tower: it is small beside the text model, and its weights are not cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from architectures.qwen3_vl.model_config import VisionConfig
from max_ray.nn import Linear, Module

Grid = tuple[int, int]
"""(rows, columns) of an image in patches."""

_EPS = 1e-6
_RGB = 3


class LayerNorm(Module):
    """Normalises the last axis to mean 0 and variance 1, then scales and shifts (Ba et al. 2016)."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.add_parameter("weight", torch.ones(dim, dtype=dtype, device=device))
        self.add_parameter("bias", torch.zeros(dim, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, _EPS)


class PatchEmbedding(Module):
    """Patches [P, 3 * frames * patch * patch] -> [P, E]. The weight has the shape of a checkpoint's 3-D convolution."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, config: VisionConfig, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.hidden_size, _RGB, config.num_frames, config.patch_size, config.patch_size)
        self.add_parameter("weight", torch.empty(shape, dtype=dtype, device=device))
        self.add_parameter("bias", torch.empty(config.hidden_size, dtype=dtype, device=device))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PositionGrid(Module):
    """Learned embeddings of a square grid, interpolated to each image's own: grids -> [P, E]."""

    weight: torch.Tensor

    def __init__(self, config: VisionConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._side, self._merge = config.grid_side, config.merge_size
        self.add_parameter("weight", torch.empty(config.grid_side**2, config.hidden_size, dtype=dtype, device=device))

    def forward(self, grids: Sequence[Grid]) -> torch.Tensor:
        return torch.cat([self._of_image(grid) for grid in grids])

    def _of_image(self, grid: Grid) -> torch.Tensor:
        """Bilinear, corners on corners; the weighted sum is taken in float32."""
        rows, columns = patch_positions(grid, self._merge, self.weight.device)
        total = torch.zeros(1, device=self.weight.device)
        for row, row_weight in self._neighbours(rows, grid[0]):
            for column, column_weight in self._neighbours(columns, grid[1]):
                weight = (row_weight * column_weight).unsqueeze(-1)
                total = total + self.weight[row * self._side + column] * weight
        return total.to(self.weight.dtype)

    def _neighbours(self, index: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The two points of the learned grid beside each index of an axis of `size`, and their weights."""
        place = index.float() * (self._side - 1) / max(size - 1, 1)
        below = place.floor()
        share = place - below
        first = below.long()
        return [(first, 1 - share), ((first + 1).clamp(max=self._side - 1), share)]


class VisionBlock(Module):
    """One layer: attention within each image, then a feed-forward layer, each behind a norm."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype, device: torch.device) -> None:
        dim, width = config.hidden_size, config.intermediate_size
        self._num_heads, self._gelu = config.num_heads, config.gelu
        self.attention_norm = LayerNorm(dim, dtype, device)
        self.qkv = Linear(dim, 3 * dim, dtype=dtype, device=device)
        self.out = Linear(dim, dim, dtype=dtype, device=device)
        self.mlp_norm = LayerNorm(dim, dtype, device)
        self.up = Linear(dim, width, dtype=dtype, device=device)
        self.down = Linear(width, dim, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor, angles: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """x [P, E], angles [P, head_dim / 2], lengths: patches of each image -> [P, E]."""
        x = x + self.out(self._attend(self.qkv(self.attention_norm(x)), angles, lengths))
        y: torch.Tensor = x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate=self._gelu))
        return y

    def _attend(self, qkv: torch.Tensor, angles: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        q, k, v = qkv.view(len(qkv), 3, self._num_heads, -1).unbind(1)  # [P, H, head_dim]
        parts = (_rotated(q, angles), _rotated(k, angles), v)
        images = zip(*(torch.split_with_sizes(part, lengths) for part in parts), strict=True)
        attended = [
            F.scaled_dot_product_attention(*(part.transpose(0, 1).unsqueeze(0) for part in image)) for image in images
        ]
        return torch.cat([image.squeeze(0).transpose(0, 1) for image in attended]).flatten(1)


class PatchMerger(Module):
    """merge_size x merge_size patches become one token: [P, E] -> [M, D].

    norms_merged: whether the norm sees the patches of a token together (deepstack) or one by one.
    """

    def __init__(self, config: VisionConfig, norms_merged: bool, dtype: torch.dtype, device: torch.device) -> None:
        self._merged = config.hidden_size * config.merge_size**2
        self._norms_merged = norms_merged
        self.norm = LayerNorm(self._merged if norms_merged else config.hidden_size, dtype, device)
        self.up = Linear(self._merged, self._merged, dtype=dtype, device=device)
        self.down = Linear(self._merged, config.out_size, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        merged = (
            self.norm(x.reshape(-1, self._merged)) if self._norms_merged else self.norm(x).reshape(-1, self._merged)
        )
        y: torch.Tensor = self.down(F.gelu(self.up(merged)))
        return y


class VisionTower(Module):
    """Patches in, features of tokens out."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self.patch_embedding = PatchEmbedding(config, dtype, device)
        self.positions = PositionGrid(config, dtype, device)
        self.layers = [VisionBlock(config, dtype, device) for _ in range(config.num_layers)]
        self.merger = PatchMerger(config, False, dtype, device)
        self.deepstack = [PatchMerger(config, True, dtype, device) for _ in config.deepstack_layers]

    def forward(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """patches [P, ...] of all images (see `patches_of`) -> [S, M, D]."""
        x = self.patch_embedding(patches) + self.positions(grids)
        angles = torch.cat([self._angles(grid, x.device) for grid in grids])
        lengths = [rows * columns for rows, columns in grids]
        deepstack: list[torch.Tensor] = []
        for number, layer in enumerate(self.layers):
            x = layer(x, angles, lengths)
            if number in self._config.deepstack_layers:
                deepstack.append(self.deepstack[len(deepstack)](x))
        return torch.stack([self.merger(x), *deepstack])

    def _angles(self, grid: Grid, device: torch.device) -> torch.Tensor:
        """[rows * columns, head_dim / 2]: half of the pairs turn with the row, half with the column."""
        width = self._config.head_dim // 2
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        inv_freq = 1.0 / self._config.rope_theta**exponents
        return torch.cat(
            [
                position.float().unsqueeze(-1) * inv_freq
                for position in patch_positions(grid, self._config.merge_size, device)
            ],
            dim=-1,
        )


def patch_positions(grid: Grid, merge: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) of each patch of an image, int64 [rows * columns] each, in the tower's order."""
    rows, columns = grid
    row = torch.arange(rows, device=device).view(rows // merge, 1, merge, 1)
    column = torch.arange(columns, device=device).view(1, columns // merge, 1, merge)
    shape = (rows // merge, columns // merge, merge, merge)
    return row.expand(shape).flatten(), column.expand(shape).flatten()


def patches_of(pixels: torch.Tensor, config: VisionConfig) -> torch.Tensor:
    """Normalised pixels float32 [height, width, 3] -> [rows * columns, 3 * frames * patch * patch], in the tower's
    order. A still image is `num_frames` equal frames."""
    merge, patch = config.merge_size, config.patch_size
    height, width, _ = pixels.shape
    blocks = pixels.reshape(height // (merge * patch), merge, patch, width // (merge * patch), merge, patch, _RGB)
    patches = blocks.permute(0, 3, 1, 4, 6, 2, 5).unsqueeze(5)  # [h, w, m, m, 3, 1, p, p]
    return patches.expand(*patches.shape[:5], config.num_frames, patch, patch).reshape(
        -1, _RGB * config.num_frames * patch**2
    )


def _rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Heads [P, H, head_dim], pair i being (i, i + head_dim / 2), turned in float32."""
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

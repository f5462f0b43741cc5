"""Qwen3VLInputs: the inputs of a step that has image tokens in it; and how they are made from the rows of a run.

Flat tokens of a step, two rows, the first in the midst of an image whose first part ran in an earlier chunk:

    [ image 0 .. | text | image 1 ........ | text ]  [ text | image 2 .. (goes on in a later chunk) ]
    token_indices name the image tokens; feature_indices the rows of the features of images 0, 1, 2 one after another
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from max_ray.interfaces import ModelInputs, PromptImage, RunRow

IntArray = npt.NDArray[np.int64]


@dataclass
class Qwen3VLInputs(ModelInputs):
    """M image tokens among T.

    images: those of which a part is in this step, equal ones once. patches: float32 [P, ...] by digest, of those whose
    features are not at hand (see `vision.patches_of`). cut: digests of images that go on in a later step.
    axis_positions: int64 [T, 3]. token_indices: int64 [M]. feature_indices: int64 [M], rows of the images' features,
    one image after another.
    """

    images: tuple[PromptImage, ...] = ()
    patches: dict[bytes, torch.Tensor] = field(default_factory=dict)
    cut: frozenset[bytes] = frozenset()
    axis_positions: torch.Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.int64))
    token_indices: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    feature_indices: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def axis_positions(row: RunRow) -> IntArray:
    """[n, 3]: time, row and column of each active token (Qwen Team 2025, "Qwen3-VL"). A text token has three equal
    numbers; the tokens of an image share the time, and count rows and columns from it on."""
    start = row.processed_length
    end = start + len(row.active_tokens)
    flat = np.arange(start, end) + row.position_offset
    for image in row.images:
        if image.end < end:
            flat[max(image.end, start) - start :] += image.position_change
    positions = np.repeat(flat[:, None], 3, axis=1)
    for image in row.images:
        cut = slice(max(image.start, start), min(image.end, end))
        number = np.arange(cut.start, cut.stop) - image.start
        first = flat[cut.start - start] - (cut.start - image.start)
        positions[cut.start - start : cut.stop - start] = first
        positions[cut.start - start : cut.stop - start, 1] += number // image.columns
        positions[cut.start - start : cut.stop - start, 2] += number % image.columns
    return positions


def image_tokens(rows: Sequence[RunRow]) -> tuple[tuple[PromptImage, ...], IntArray, IntArray]:
    """(the images of a step, equal ones once; token_indices [M]; feature_indices [M]), see Qwen3VLInputs."""
    first_feature: dict[bytes, int] = {}
    images: list[PromptImage] = []
    num_features = first_token = 0
    tokens, features = [], []
    for row in rows:
        start, count = row.processed_length, len(row.active_tokens)
        for image in row.images:
            if image.digest not in first_feature:
                first_feature[image.digest] = num_features
                images.append(image)
                num_features += image.num_tokens
            span = np.arange(max(image.start, start), min(image.end, start + count))
            tokens.append(first_token + span - start)
            features.append(first_feature[image.digest] + span - image.start)
        first_token += count
    return tuple(images), np.concatenate(tokens), np.concatenate(features)


def cut_images(rows: Sequence[RunRow]) -> frozenset[bytes]:
    """Digests of the images that go on behind the active tokens."""
    return frozenset(
        image.digest
        for row in rows
        for image in row.images
        if image.end > row.processed_length + len(row.active_tokens)
    )

"""PromptImage: an image of a prompt, resized for its model, and the tokens that stand for it.

An image stands for rows x columns placeholder tokens, side by side in the prompt. Its positions (Qwen Team 2025,
"Qwen3-VL", interleaved MRoPE) are three numbers a token, time, row and column: the image begins at one position, and
the text after it goes on max(rows, columns) positions later. So behind an image a token's position is less than its
index; the difference is the row's *position offset*, at most zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class PromptImage:
    """pixels: uint8 [H, W, 3]. scale, shift: float32 [3]; a pixel becomes pixel * scale + shift.

    start: index in the prompt of the first placeholder token. rows, columns: of placeholder tokens.
    digest: 16 bytes, equal only for equal pixels; it stands for them in the hashes of KV blocks.
    """

    pixels: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float32]
    shift: npt.NDArray[np.float32]
    start: int
    rows: int
    columns: int
    digest: bytes

    @property
    def num_tokens(self) -> int:
        return self.rows * self.columns

    @property
    def end(self) -> int:
        """Index of the token after the last placeholder."""
        return self.start + self.num_tokens

    @property
    def position_change(self) -> int:
        """What the image adds to the position offset of the text behind it: at most 0."""
        return max(self.rows, self.columns) - self.num_tokens


def images_within(images: Sequence[PromptImage], start: int, end: int) -> tuple[PromptImage, ...]:
    """Those that have a token in [start, end)."""
    return tuple(image for image in images if image.start < end and start < image.end)


def position_offset(images: Sequence[PromptImage], index: int) -> int:
    """Position minus index of the token at `index`, as far as images that end before it make it."""
    return sum(image.position_change for image in images if image.end <= index)

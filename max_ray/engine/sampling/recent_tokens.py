"""RecentTokens: the last tokens of some rows, on the device, so that no step has to wait for the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from max_ray.driver import upload

NO_TOKEN_YET = -1


class RecentTokens:
    """A window on the end of each text.

    Args:
        texts: int64 arrays, one a row.
        length: Tokens to keep of each.
        device: Where they are kept.

    Attributes:
        tokens: int64 [R, length], the latest last; NO_TOKEN_YET before the beginning of a text.
    """

    def __init__(self, texts: Sequence[npt.NDArray[np.int64]], length: int, device: torch.device) -> None:
        ends = np.full((len(texts), length), NO_TOKEN_YET, dtype=np.int64)
        for line, text in zip(ends, texts, strict=True):
            end = text[max(0, len(text) - length) :]
            line[length - len(end) :] = end
        self.tokens = upload(ends, device)

    def append(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Takes one more token of some rows.

        Args:
            slots: int64 [n], rows.
            tokens: int64 [n].
        """
        if self.tokens.shape[1]:
            moved = torch.cat([self.tokens[slots, 1:], tokens[:, None]], dim=1)
            self.tokens.index_copy_(0, slots, moved)

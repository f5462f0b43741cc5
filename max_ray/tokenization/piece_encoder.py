"""Token ids of a text that comes in pieces, between which no token may lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from max_ray.errors import InputError

TokenArray = npt.NDArray[np.int64]


class PieceEncoder:
    """encode: ids of a text, int64 [n], without special tokens around it. decode: text of ids. control_ids: tokens that
    only a template may write."""

    def __init__(
        self, encode: Callable[[str], TokenArray], decode: Callable[[Sequence[int]], str], control_ids: Iterable[int]
    ) -> None:
        self._encode, self._decode = encode, decode
        self._control_ids = list(control_ids)

    def encode(self, pieces: Sequence[str], num_control: int) -> TokenArray:
        """Ids of the whole text, int64 [n]. Raises InputError where there are more control tokens than `num_control`:
        then the tokenizer makes one of them out of plain text."""
        first, *others = pieces
        ids = np.concatenate([self._encode(first), *map(self._continued, others)])
        if np.isin(ids, self._control_ids).sum() > num_control:
            raise InputError(
                "The messages spell a control token in a way that this tokenizer cannot take as text.", param="messages"
            )
        return ids

    def _continued(self, text: str) -> TokenArray:
        """Ids of a text that goes on another: without the space that some tokenizers put before a text."""
        guard, guard_ids = self._guard
        ids = self._encode(guard + text)
        length = len(guard_ids)
        return ids[length:] if ids[:length].tolist() == guard_ids else self._encode(text)

    @cached_property
    def _guard(self) -> tuple[str, list[int]]:
        """A text behind which others begin as they would in the middle; empty where every place is alike."""
        joined = [*self._encode("a").tolist(), *self._encode("b").tolist()]
        if self._decode(joined) == "ab":
            return "", []
        return "\n", self._encode("\n").tolist()

"""Places: where the rows with a certain need stand in a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from max_ray.driver import upload


class Places:
    """The rows of a run that need something, looked up batch by batch. Uploads anew only when the batch changes.

    Args:
        numbers: Rows of the run, ascending. Row numbers[i] has slot i.
        device: Where the answers lie.
    """

    def __init__(self, numbers: Sequence[int], device: torch.device) -> None:
        self._slots = {number: slot for slot, number in enumerate(numbers)}
        self._device = device
        self._key: tuple[int, ...] = ()
        self._found = self._upload(())

    def __len__(self) -> int:
        return len(self._slots)

    def of(self, numbers: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """(places in the batch, slots), int64 [n] each.

        Args:
            numbers: int64 [N], the run's rows in the batch.
        """
        key = tuple(numbers.tolist())
        if key != self._key:
            self._key, self._found = key, self._upload(key)
        return self._found

    def any_of(self, numbers: npt.NDArray[np.int64]) -> bool:
        """Whether the batch has such a row."""
        return len(self.of(numbers)[0]) > 0

    def _upload(self, key: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [(place, self._slots[number]) for place, number in enumerate(key) if number in self._slots]
        table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        return upload(table[:, 0].copy(), self._device), upload(table[:, 1].copy(), self._device)

"""LogitsProcessor: the contract of what edits logits before a token is drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

NO_TOKEN = -1
"""In place of the token of a row that cannot go on."""


class LogitsProcessor(ABC):
    """Edits the logits of some rows of one run.

    A processor is made for each run from the run's rows, that is, from the tokens of their contexts. It keeps nothing
    that the next run needs: a preempted request, or one whose worker died, goes on as if nothing had happened.

    needs_host_tokens: The tokens of a step must be on the host, and given to `accept`, before the next step is sampled.
        Runs with such a processor launch no step ahead.
    """

    needs_host_tokens = False

    @abstractmethod
    def is_due(self, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> bool:
        """Whether `edit` would change anything in this step. Asked before the logits are copied.

        Args:
            numbers: int64 [N], the run's rows in the step.
            generated: int64 [N], how many tokens each has generated.
        """

    @abstractmethod
    def edit(self, logits: torch.Tensor, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> None:
        """Changes logits in place. Must not wait for the device.

        Args:
            logits: float32 [N, V] on the device, a copy for this step; row i is that of rows[numbers[i]].
            numbers: As for `is_due`.
            generated: As for `is_due`.
        """

    def observe(self, numbers: npt.NDArray[np.int64], tokens: torch.Tensor) -> None:
        """Takes the tokens of a step while they are on the device. Must not wait for it.

        Args:
            numbers: As for `is_due`.
            tokens: int64 [N] on the device.
        """

    def accept(self, numbers: Sequence[int], tokens: Sequence[int]) -> dict[int, str] | None:
        """Takes the tokens of a step on the host. Called only where `needs_host_tokens`.

        Args:
            numbers: The run's rows in the step.
            tokens: Theirs; NO_TOKEN for a row that got none.

        Returns:
            Row -> why it got none.
        """
        return None

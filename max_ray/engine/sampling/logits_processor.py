"""LogitsProcessor: the contract of what edits logits before a token is drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch


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

"""Edits of the logits before anything is drawn: the three penalties and the min-tokens mask.

State lives for one run and is built from the rows' history: counts of the output tokens and a mark on every prompt
token, for the rows that need it and no others (P rows; memory P * V * 5 bytes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from max_ray.driver import upload
from max_ray.engine.sampling.logits_processor import LogitsProcessor
from max_ray.engine.sampling.recent_tokens import RecentTokens
from max_ray.interfaces.executor import RunRow
from max_ray.interfaces.request import SamplingParams


class Penalties:
    """Repetition, frequency and presence penalties of the rows that have some.

    output_counts: int32 [P, V]. in_prompt: bool [P, V]. `slots` maps a row's number to its line in them.
    """

    def __init__(self, rows: Sequence[RunRow], vocab_size: int, device: torch.device) -> None:
        numbers = [i for i, row in enumerate(rows) if row.samples and row.sampling_params.needs_penalties]
        self.slots = {number: slot for slot, number in enumerate(numbers)}
        self.output_counts = torch.zeros(len(numbers), vocab_size, dtype=torch.int32, device=device)
        self.in_prompt = torch.zeros(len(numbers), vocab_size, dtype=torch.bool, device=device)
        for number, slot in self.slots.items():
            self._read_history(rows[number], slot)
        params = [rows[number].sampling_params for number in numbers]

        def column(value: Callable[[SamplingParams], float]) -> torch.Tensor:
            return upload(np.array([value(p) for p in params], dtype=np.float32)[:, None], device)

        self._repetition = column(lambda p: min(max(p.repetition_penalty, 1e-30), 1e30))  # not 0 or inf in float32
        self._frequency = column(lambda p: p.frequency_penalty)
        self._presence = column(lambda p: p.presence_penalty)
        windows = [_window(p) for p in params]
        self._windows = _Windows(windows, rows, numbers, device) if max(windows, default=-1) >= 0 else None

    def _read_history(self, row: RunRow, slot: int) -> None:
        assert row.history is not None, "a row with penalties came without its history"
        device = self.in_prompt.device
        self.in_prompt[slot].index_fill_(0, upload(row.history[: row.prompt_length], device), True)
        ids, counts = np.unique(row.history[row.prompt_length :], return_counts=True)
        counts = counts.astype(np.int32)
        self.output_counts[slot].index_copy_(0, upload(ids, device), upload(counts, device))

    def apply(self, logits: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Penalized copy of float32 `logits` [n, V], row i being line slots[i] (int64 [n]).

        Repetition: logits of tokens in prompt or output are divided by the penalty when positive and multiplied by it
        otherwise (Keskar et al. 2019, section 4.1, with the sign rule of Hugging Face). Then frequency * count and
        presence are subtracted for tokens in the output (OpenAI API reference).
        """
        counts, in_prompt = self.output_counts[slots], self.in_prompt[slots]
        if self._windows is not None:
            counts, in_prompt = self._windows.limited(slots, counts, in_prompt)
        in_output = counts > 0
        repetition = self._repetition[slots]
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(in_output | in_prompt, repeated, logits)
        return logits - self._frequency[slots] * counts - self._presence[slots] * in_output

    def count(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Takes the sampled `tokens` (int64 [n], row i of line slots[i]) into the output."""
        self.output_counts[slots, tokens] += 1
        if self._windows is not None:
            self._windows.append(slots, tokens)


def _window(params: SamplingParams) -> int:
    """How many of the last tokens the penalties look at; -1: all."""
    return -1 if params.logit_controls is None else params.logit_controls.repeat_last_n


class _Windows:
    """Counts of the last tokens alone, for the rows whose penalties look at no others.

    Args:
        lengths: A window a line of the penalties; -1: the whole text.
        rows: All rows of the run.
        numbers: The row of each line.
        device: Of the penalties.
    """

    def __init__(
        self, lengths: Sequence[int], rows: Sequence[RunRow], numbers: Sequence[int], device: torch.device
    ) -> None:
        texts = [rows[number].history for number in numbers]
        generated = [rows[number].generated_length for number in numbers]
        self._recent = RecentTokens([text for text in texts if text is not None], max(lengths), device)
        self._lengths = upload(np.array(lengths, dtype=np.int64)[:, None], device)
        self._num_generated = upload(np.array(generated, dtype=np.int64)[:, None], device)
        self._ages = torch.arange(max(lengths) - 1, -1, -1, device=device)  # 0 is the last token

    def append(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        self._recent.append(slots, tokens)
        self._num_generated[slots] += 1

    def limited(
        self, slots: torch.Tensor, counts: torch.Tensor, in_prompt: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`counts` and `in_prompt` [n, V] of lines `slots`, in which lines with a window count its tokens alone."""
        tokens, lengths = self._recent.tokens[slots], self._lengths[slots]
        is_within = (tokens >= 0) & (self._ages < lengths)
        is_output = is_within & (self._ages < self._num_generated[slots])
        ids = tokens.clamp(min=0)
        output = torch.zeros_like(counts).scatter_add_(1, ids, is_output.to(counts.dtype))
        prompt = torch.zeros_like(counts).scatter_add_(1, ids, (is_within & ~is_output).to(counts.dtype)) > 0
        return torch.where(lengths < 0, counts, output), torch.where(lengths < 0, in_prompt, prompt)


class MinTokens(LogitsProcessor):
    """Forbids the tokens that would end a row while it has fewer than `min_new_tokens` tokens."""

    def __init__(self, rows: Sequence[RunRow], vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._stop_ids = [sorted(i for i in row.stop_ids if 0 <= i < vocab_size) for row in rows]
        wanted = [
            row.sampling_params.min_new_tokens if ids else 0 for row, ids in zip(rows, self._stop_ids, strict=True)
        ]
        self._min_new_tokens = np.array(wanted, dtype=np.int64)
        self._forbidden = torch.full((), -torch.inf, device=device)
        self._key: tuple[int, ...] = ()
        self._where: tuple[torch.Tensor, torch.Tensor] | None = None

    def is_due(self, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> bool:
        return bool((generated < self._min_new_tokens[numbers]).any())

    def edit(self, logits: torch.Tensor, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> None:
        held = generated < self._min_new_tokens[numbers]
        key = tuple(np.where(held, numbers, -1).tolist())
        if key != self._key or self._where is None:
            pairs = [(p, i) for p, number in enumerate(key) if number >= 0 for i in self._stop_ids[number]]
            positions, ids = upload(np.array(pairs, dtype=np.int64), self._device).unbind(1)
            self._key, self._where = key, (positions, ids)
        logits.index_put_(self._where, self._forbidden)

"""Masks of structured output: tokens that do not fit a row's grammar get no probability.

The mask of a step is made on the host while the device computes the step's logits; it goes up as bits and is unpacked
there. A row whose grammar fails gets NO_TOKEN instead of a token, which ends it on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from max_ray.driver import upload
from max_ray.engine.sampling.logits_processor import LogitsProcessor
from max_ray.errors import StructuredOutputError
from max_ray.interfaces.executor import RunRow

if TYPE_CHECKING:
    from max_ray.structured_output import GrammarCompiler, GrammarMatcher

NO_TOKEN = -1


def needs_host(row: RunRow) -> bool:
    """Whether a row's next token depends on something that the host makes of the one before."""
    return row.sampling_params.structured_output is not None


class GrammarMasks(LogitsProcessor):
    """The matchers of one run's rows."""

    needs_host_tokens = True

    def __init__(
        self, rows: Sequence[RunRow], vocab_size: int, device: torch.device, grammars: GrammarCompiler
    ) -> None:
        self._rows = {number: row for number, row in enumerate(rows) if needs_host(row)}
        self._vocab_size = vocab_size
        self._device = device
        self._grammars = grammars
        self._matchers: dict[int, GrammarMatcher] = {}
        self._errors: dict[int, str] = {}
        for row in self._rows.values():  # compiled while the first step computes
            assert row.sampling_params.structured_output is not None
            grammars.start(row.sampling_params.structured_output)

    def is_due(self, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> bool:
        return any(number in self._rows for number in numbers.tolist())

    def edit(self, logits: torch.Tensor, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> None:
        masked = [(place, number) for place, number in enumerate(numbers.tolist()) if number in self._rows]
        bits = np.empty((len(masked), -(-self._vocab_size // 32)), dtype=np.uint32)
        for line, (_, number) in zip(bits, masked, strict=True):
            self._fill(number, line)
        places = upload(np.array([place for place, _ in masked], dtype=np.int64), self._device)
        forbidden = ~_unpacked(bits, self._vocab_size, self._device)
        if len(masked) == len(logits):
            logits.masked_fill_(forbidden, -torch.inf)
        else:
            logits.index_copy_(0, places, logits.index_select(0, places).masked_fill_(forbidden, -torch.inf))

    def failed_among(self, numbers: Sequence[int]) -> list[int]:
        """Places in a batch of rows that cannot go on."""
        return [place for place, number in enumerate(numbers) if number in self._errors] if self._errors else []

    def accept(self, numbers: Sequence[int], tokens: Sequence[int]) -> dict[int, str] | None:
        """Takes the tokens that a step gave to these rows. Gives the reasons of those that got NO_TOKEN."""
        failed = {number: self._errors[number] for number, token in zip(numbers, tokens, strict=True) if token < 0}
        for number, token in zip(numbers, tokens, strict=True):
            matcher = self._matchers.get(number)
            if matcher is not None and token >= 0:
                self._advance(number, matcher, token)
        return failed or None

    def _advance(self, number: int, matcher: GrammarMatcher, token: int) -> None:
        try:
            matcher.advance([token])
        except StructuredOutputError as error:
            self._errors[number] = str(error)

    def _fill(self, number: int, bits: npt.NDArray[np.uint32]) -> None:
        """Makes one row's mask; all tokens where the grammar has failed."""
        try:
            if number not in self._errors:
                self._matcher(number).fill_mask(bits)
                return
        except StructuredOutputError as error:
            self._errors[number] = str(error)
        bits.fill(0xFFFFFFFF)

    def _matcher(self, number: int) -> GrammarMatcher:
        matcher = self._matchers.get(number)
        if matcher is None:
            row = self._rows[number]
            spec, history = row.sampling_params.structured_output, row.history
            assert spec is not None, "a row without a grammar has no matcher"
            assert history is not None, "a row with a grammar came without its history"
            generated = history[row.prompt_length :].tolist()
            matcher = self._matchers[number] = self._grammars.matcher(spec, row.stop_ids, generated, row.request_id)
        return matcher


def _unpacked(bits: npt.NDArray[np.uint32], vocab_size: int, device: torch.device) -> torch.Tensor:
    """bool [n, V] on the device of uint32 [n, ceil(V / 32)]."""
    if device.type == "cpu":
        flags = np.unpackbits(bits.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        return torch.from_numpy(flags.view(np.bool_))
    words = upload(bits.view(np.int32), device)
    shifts = torch.arange(32, dtype=torch.int32, device=device)
    return ((words[:, :, None] >> shifts) & 1).bool().flatten(1)[:, :vocab_size]

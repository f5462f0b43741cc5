"""Masks of structured output: tokens that do not fit a row's grammar get no probability.

The mask of a step depends on the tokens before it alone, so it is made in a thread while the step's logits are
computed. Where the grammar leaves few tokens, the CPU draws among these alone: the token is the same, and costs less
than one from the whole vocabulary. A row whose grammar fails gets NO_TOKEN instead of a token, which ends it on every
rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
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
MAX_FEW = 2048
"""So many tokens or fewer are drawn among by themselves."""


def needs_host(row: RunRow) -> bool:
    """Whether a row's next token depends on something that the host makes of the one before."""
    return row.sampling_params.structured_output is not None


@dataclass(frozen=True, slots=True)
class RowMask:
    """What one row may say next. bits: uint32 [ceil(V / 32)]. few: the allowed ids in order, int64, where they are
    few; else None. error: why the row cannot go on; all tokens are allowed then."""

    bits: npt.NDArray[np.uint32]
    few: npt.NDArray[np.int64] | None = None
    error: str | None = None


class GrammarMasks(LogitsProcessor):
    """The matchers of one run's rows. All that they do is done in the one thread of `grammars` for masks, in order.

    draws_among_few: the caller takes the tokens of rows with few allowed ones from `few`; they are masked only where
    their log probabilities are reported.
    """

    needs_host_tokens = True

    def __init__(
        self,
        rows: Sequence[RunRow],
        vocab_size: int,
        device: torch.device,
        grammars: GrammarCompiler,
        draws_among_few: bool = False,
    ) -> None:
        self._rows = {number: row for number, row in enumerate(rows) if needs_host(row)}
        self._vocab_size = vocab_size
        self._device = device
        self._grammars = grammars
        self._draws_among_few = draws_among_few
        self._matchers: dict[int, GrammarMatcher] = {}
        self._masks: Mapping[int, RowMask] = {}
        for row in self._rows.values():
            assert row.sampling_params.structured_output is not None
            grammars.start(row.sampling_params.structured_output)
        first = [number for number, row in self._rows.items() if row.samples]
        self._pending: Future[dict[int, RowMask]] | None = grammars.in_mask_thread(lambda: self._masks_of(first))

    def is_due(self, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> bool:
        self._wait()
        return any(self._is_masked(number) for number in numbers.tolist())

    def edit(self, logits: torch.Tensor, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> None:
        masked = [place for place, number in enumerate(numbers.tolist()) if self._is_masked(number)]
        bits = np.stack([self._masks[int(numbers[place])].bits for place in masked])
        forbidden = ~_unpacked(bits, self._vocab_size, self._device)
        if len(masked) == len(logits):
            logits.masked_fill_(forbidden, -torch.inf)
        else:
            places = upload(np.array(masked, dtype=np.int64), self._device)
            logits.index_copy_(0, places, logits.index_select(0, places).masked_fill_(forbidden, -torch.inf))

    def few(self, numbers: Sequence[int]) -> dict[int, npt.NDArray[np.int64]]:
        """The allowed ids by place in a batch of rows, for those that are drawn among few."""
        if not self._draws_among_few:
            return {}
        found = {place: self._masks[number].few for place, number in enumerate(numbers) if number in self._masks}
        return {place: ids for place, ids in found.items() if ids is not None}

    def failed_among(self, numbers: Sequence[int]) -> list[int]:
        """Places in a batch of rows that cannot go on."""
        return [place for place, number in enumerate(numbers) if self._error(number) is not None]

    def accept(self, numbers: Sequence[int], tokens: Sequence[int]) -> dict[int, str] | None:
        """Takes the tokens that a step gave to these rows. Gives the reasons of those that got NO_TOKEN."""
        given = dict(zip(numbers, tokens, strict=True))
        errors = {number: self._error(number) or "" for number, token in given.items() if token == NO_TOKEN}
        going_on = {
            number: token
            for number, token in given.items()
            if number in self._rows and token != NO_TOKEN and token not in self._rows[number].stop_ids
        }
        self._pending = self._grammars.in_mask_thread(lambda: self._masks_after(going_on))
        return errors or None

    def _error(self, number: int) -> str | None:
        mask = self._masks.get(number)
        return None if mask is None else mask.error

    def _is_masked(self, number: int) -> bool:
        mask = self._masks.get(number)
        if mask is None:
            return False
        is_reported = self._rows[number].log_probabilities is not None
        return mask.few is None or is_reported or not self._draws_among_few

    def _wait(self) -> None:
        if self._pending is not None:
            self._masks, self._pending = self._pending.result(), None

    # In the thread for masks.

    def _masks_after(self, tokens: Mapping[int, int]) -> dict[int, RowMask]:
        """The masks of these rows after one more token each."""
        errors: dict[int, str] = {}
        for number, token in tokens.items():
            try:
                self._matchers[number].advance([token])
            except StructuredOutputError as error:
                errors[number] = str(error)
        masks = self._masks_of([number for number in tokens if number not in errors])
        return masks | {number: self._failed(reason) for number, reason in errors.items()}

    def _masks_of(self, numbers: Sequence[int]) -> dict[int, RowMask]:
        return {number: self._mask_of(number) for number in numbers}

    def _mask_of(self, number: int) -> RowMask:
        bits = np.empty(-(-self._vocab_size // 32), dtype=np.uint32)
        try:
            self._matcher(number).fill_mask(bits)
        except StructuredOutputError as error:
            return self._failed(str(error))
        if int(np.bitwise_count(bits).sum()) > MAX_FEW:
            return RowMask(bits)
        flags = np.unpackbits(bits.view(np.uint8), count=self._vocab_size, bitorder="little")
        return RowMask(bits, np.flatnonzero(flags).astype(np.int64, copy=False))

    def _failed(self, reason: str) -> RowMask:
        return RowMask(np.full(-(-self._vocab_size // 32), 0xFFFFFFFF, dtype=np.uint32), error=reason)

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

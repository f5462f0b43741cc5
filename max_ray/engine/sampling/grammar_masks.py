"""Masks of structured output: tokens that do not fit a row's grammar get no probability.

The mask of a step depends on the tokens before it alone, so it is made in a thread while the step's logits are
computed. Unless the grammar leaves most tokens, the CPU draws among these alone: the token is the same, and costs less
than one from the whole vocabulary. A row whose grammar fails gets NO_TOKEN instead of a token, which ends it on every
rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from max_ray.driver import upload
from max_ray.engine.forced_tokens import counts_forced
from max_ray.engine.sampling.logits_processor import NO_TOKEN, LogitsProcessor
from max_ray.errors import StructuredOutputError
from max_ray.interfaces.executor import RunRow

if TYPE_CHECKING:
    from max_ray.structured_output import GrammarCompiler, GrammarMatcher, ReasoningMatcher

MAX_ROWS_TO_WAIT = 8
MAX_SHARE = 0.75
"""Of the vocabulary: so many tokens or fewer are drawn among by themselves. To hide the others from a draw costs more
than the draw does: `exp` of -inf is several times as slow."""


def has_grammar(row: RunRow) -> bool:
    """Whether a row's text must match a grammar."""
    return row.sampling_params.structured_output is not None


@dataclass(frozen=True, slots=True)
class RowMask:
    """What one row may say next.

    bits: uint32 [ceil(V / 32)], bit i % 32 of word i // 32 is set where token i is allowed. forbidden: bool [V], the
    other tokens, on a CPU where `few` is None. few: the allowed ids in order, int64, on a CPU where they are not most
    of the vocabulary. error: why the row cannot go on; all tokens are allowed then. num_forced: how many tokens have
    no alternative, the next one included.
    """

    bits: npt.NDArray[np.uint32]
    forbidden: torch.Tensor | None = None
    few: npt.NDArray[np.int64] | None = None
    error: str | None = None
    num_forced: int = 0


class GrammarMasks(LogitsProcessor):
    """The matchers of one run's rows. All that they do is done in the one thread of `grammars` for masks, in order.

    masks_when_drawn: the caller applies `masks_of` when it draws; `edit` masks only rows whose log probabilities are
    reported.
    """

    needs_host_tokens = True

    def __init__(
        self,
        rows: Sequence[RunRow],
        vocab_size: int,
        device: torch.device,
        grammars: GrammarCompiler,
        masks_when_drawn: bool = False,
    ) -> None:
        self._rows = {number: row for number, row in enumerate(rows) if has_grammar(row)}
        self._vocab_size = vocab_size
        self._device = device
        self._grammars = grammars
        self._masks_when_drawn = masks_when_drawn
        self._forceable = {number for number, row in self._rows.items() if counts_forced(row)}
        self._matchers: dict[int, GrammarMatcher | ReasoningMatcher] = {}
        self._masks: Mapping[int, RowMask] = {}
        for row in self._rows.values():
            assert row.sampling_params.structured_output is not None
            grammars.start(row.sampling_params.structured_output)
        first = [number for number, row in self._rows.items() if row.samples]
        self._pending: Future[dict[int, RowMask]] | None = grammars.in_mask_thread(lambda: self._made(first))

    def is_due(self, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> bool:
        self._wait()
        return any(self._is_masked(number) for number in numbers.tolist())

    def edit(self, logits: torch.Tensor, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> None:
        masks = {place: self._masks[n] for place, n in enumerate(numbers.tolist()) if self._is_masked(n)}
        if self._device.type == "cpu":
            for place, mask in masks.items():
                logits[place].masked_fill_(_forbidden(mask.bits, self._vocab_size), -torch.inf)
            return
        words = upload(np.stack([mask.bits for mask in masks.values()]).view(np.int32), self._device)
        shifts = torch.arange(32, dtype=torch.int32, device=self._device)
        forbidden = ((words[:, :, None] >> shifts) & 1).flatten(1)[:, : self._vocab_size] == 0
        places = upload(np.array(list(masks), dtype=np.int64), self._device)
        logits.index_copy_(0, places, logits.index_select(0, places).masked_fill_(forbidden, -torch.inf))

    def masks_of(self, numbers: Sequence[int]) -> dict[int, RowMask]:
        """Masks by place in a batch of rows, where they are applied when tokens are drawn."""
        if not self._masks_when_drawn:
            return {}
        return {place: self._masks[number] for place, number in enumerate(numbers) if number in self._masks}

    def num_forced(self, numbers: Sequence[int]) -> int:
        """Tokens that must come next in these rows, as far as it is worth knowing: finding out waits for the masks of
        the next step. 0 on a GPU and for many rows, whose masks are better made while the step computes."""
        if not self._masks_when_drawn or len(numbers) > MAX_ROWS_TO_WAIT:
            return 0
        self._wait()
        return sum(self._masks[number].num_forced for number in numbers if number in self._masks)

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
        is_reported = number in self._masks and self._rows[number].log_probabilities is not None
        return is_reported or (number in self._masks and not self._masks_when_drawn)

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
        masks = self._made([number for number in tokens if number not in errors])
        return masks | {number: self._failed(reason) for number, reason in errors.items()}

    def _made(self, numbers: Sequence[int]) -> dict[int, RowMask]:
        return {number: self._mask_of(number) for number in numbers}

    def _mask_of(self, number: int) -> RowMask:
        bits = np.empty(-(-self._vocab_size // 32), dtype=np.uint32)
        try:
            self._matcher(number).fill_mask(bits)
        except StructuredOutputError as error:
            return self._failed(str(error))
        mask = self._row_mask(bits)
        if mask.few is not None and len(mask.few) == 1 and number in self._forceable:
            mask = replace(mask, num_forced=len(self._matcher(number).forced_tokens()))
        return mask

    def _row_mask(self, bits: npt.NDArray[np.uint32], error: str | None = None) -> RowMask:
        if self._device.type != "cpu":
            return RowMask(bits, error=error)
        if int(np.bitwise_count(bits).sum()) <= MAX_SHARE * self._vocab_size:
            return RowMask(bits, few=_ids_in(bits, self._vocab_size), error=error)
        return RowMask(bits, _forbidden(bits, self._vocab_size), error=error)

    def _failed(self, reason: str) -> RowMask:
        return self._row_mask(np.full(-(-self._vocab_size // 32), 0xFFFFFFFF, dtype=np.uint32), reason)

    def _matcher(self, number: int) -> GrammarMatcher | ReasoningMatcher:
        matcher = self._matchers.get(number)
        if matcher is None:
            row = self._rows[number]
            spec, history = row.sampling_params.structured_output, row.history
            assert spec is not None, "a row without a grammar has no matcher"
            assert history is not None, "a row with a grammar came without its history"
            generated = history[row.prompt_length :].tolist()
            matcher = self._matchers[number] = self._grammars.matcher(spec, row.stop_ids, generated, row.request_id)
        return matcher


def _forbidden(bits: npt.NDArray[np.uint32], vocab_size: int) -> torch.Tensor:
    """bool [V], on the CPU: the tokens that a mask does not allow."""
    flags = np.unpackbits(~bits.view(np.uint8), count=vocab_size, bitorder="little")
    return torch.from_numpy(flags.view(np.bool_))


def _ids_in(bits: npt.NDArray[np.uint32], vocab_size: int) -> npt.NDArray[np.int64]:
    """int64, in order: the tokens that a mask allows."""
    flags = np.unpackbits(bits.view(np.uint8), count=vocab_size, bitorder="little")
    return np.flatnonzero(flags.view(np.bool_)).astype(np.int64, copy=False)

"""The sampler of one run: from the logits of a step to one token a row. Used by the model runner.

Order of operations: repetition, frequency and presence penalties; min-tokens and grammar masks; report of log
probabilities; then argmax for greedy rows (ties: the lowest id), and temperature, top-k, top-p, min-p and one draw for
the others.

Rows are grouped once, and again only when a row ends: a batch that is greedy throughout costs one argmax. State lives
for one run (tokens generated per row, penalty counts) and is rebuilt from the rows by the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from max_ray import kernels
from max_ray.driver import upload
from max_ray.engine.sampling.device_draw import DeviceDraw, SamplingKernel, sampling_kernel
from max_ray.engine.sampling.draw import Filters, draw, draw_filtered, is_filtered
from max_ray.engine.sampling.grammar_masks import NO_TOKEN, GrammarMasks, RowMask, needs_host
from max_ray.engine.sampling.logits_processor import LogitsProcessor
from max_ray.engine.sampling.logprobs import TokenReport, prompt_logprobs
from max_ray.engine.sampling.penalties import MinTokens, Penalties
from max_ray.engine.sampling.philox import uniforms
from max_ray.interfaces.context import LogProbabilities
from max_ray.interfaces.executor import RunRow

if TYPE_CHECKING:
    from max_ray.structured_output import GrammarCompiler

__all__ = ["NO_TOKEN", "Sampled", "Sampler", "needs_host", "prompt_logprobs"]

_DRAWS_AHEAD = 32  # random numbers made at once for each row


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one step gave. tokens: int64 [N] on the device. `report` has the rows that want log probabilities."""

    tokens: torch.Tensor
    report: TokenReport | None
    report_rows: list[int]
    report_num_top: list[int]

    @property
    def log_probabilities(self) -> dict[int, LogProbabilities] | None:
        """Row number -> entry of its token; None when no row of the step asked. Waits for the device."""
        if self.report is None:
            return None
        return dict(zip(self.report_rows, self.report.entries(self.report_num_top), strict=True))


class Sampler:
    """Picks the next tokens for the rows of one run. `row_ids` are indices into the `rows` it was made with.

    kernel: draws on the device, in one launch and without waiting for it (default: what this device has). The tokens
    are the same with and without one. grammars: where rows have a structured output.
    """

    def __init__(
        self,
        rows: Sequence[RunRow],
        vocab_size: int,
        device: torch.device,
        kernel: SamplingKernel | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self._rows = rows
        self._vocab_size = vocab_size
        self._device = device
        self._kernel = kernel or sampling_kernel(device)
        self._generated = np.array([row.generated_length for row in rows], dtype=np.int64)
        self._penalties = Penalties(rows, vocab_size, device)
        self._processors: list[LogitsProcessor] = []
        if any(row.sampling_params.min_new_tokens for row in rows):
            self._processors.append(MinTokens(rows, vocab_size, device))
        self._grammar_masks: GrammarMasks | None = None
        if any(map(needs_host, rows)):
            assert grammars is not None, "a run with structured output on an engine that was made without grammars"
            self._grammar_masks = GrammarMasks(
                rows, vocab_size, device, grammars, masks_when_drawn=self._kernel is None
            )
            self._processors.append(self._grammar_masks)
        self._uniforms = _Uniforms(rows)
        self._batch = self._batch_of(())

    def sample(self, logits: torch.Tensor, row_ids: Sequence[int]) -> Sampled:
        """One token for each row of the step; `logits` [N, V] of any float type, row i for rows[row_ids[i]]. NO_TOKEN
        for a row that cannot go on, of which `accept` tells the reason.

        Counts the tokens as generated: one call per step.
        """
        assert logits.shape == (len(row_ids), self._vocab_size), f"logits {tuple(logits.shape)}, {len(row_ids)} rows"
        key = tuple(int(i) for i in row_ids)
        if key != self._batch.key:
            self._batch = self._batch_of(key)
        batch, numbers = self._batch, np.array(key, dtype=np.int64)
        logits = self._edit(logits, batch, numbers)
        masks = {} if self._grammar_masks is None else self._grammar_masks.masks_of(key)
        tokens = self._pick_masked(logits, batch, numbers, masks) if masks else self._pick(logits, batch, numbers)
        if batch.penalized is not None:
            self._penalties.count(batch.penalty_slots, tokens[batch.penalized])
        self._generated[numbers] += 1
        report = batch.report(logits, tokens)
        if self._grammar_masks is not None and (failed := self._grammar_masks.failed_among(key)):
            tokens = tokens.index_fill(0, upload(np.array(failed, dtype=np.int64), self._device), NO_TOKEN)
        return Sampled(tokens, report, batch.report_rows, batch.report_num_top)

    @property
    def needs_host(self) -> bool:
        """Whether each step's tokens must be given to `accept` before the next one is sampled."""
        return self._grammar_masks is not None

    def num_forced(self, row_ids: Sequence[int]) -> int:
        """Tokens that must come next in these rows, whose last ones have been given to `accept`."""
        return 0 if self._grammar_masks is None else self._grammar_masks.num_forced(row_ids)

    def accept(self, row_ids: Sequence[int], tokens: Sequence[int]) -> dict[int, str] | None:
        """Takes the tokens of the last step, now that they are on the host. Gives the reasons of rows that got none."""
        return None if self._grammar_masks is None else self._grammar_masks.accept(row_ids, tokens)

    def _batch_of(self, key: tuple[int, ...]) -> _Batch:
        batch = _Batch(key, self._rows, self._penalties, self._vocab_size, self._device)
        if self._kernel is not None:
            batch.draw_by(self._kernel, self._rows, self._generated)
        return batch

    def _edit(self, logits: torch.Tensor, batch: _Batch, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        """Penalties and masks; the caller's logits stay as they are."""
        generated = self._generated[numbers]
        edits = [processor for processor in self._processors if processor.is_due(numbers, generated)]
        if batch.penalized is None and not edits:
            return logits
        logits = logits.to(torch.float32, copy=True)
        if batch.penalized is not None:
            logits[batch.penalized] = self._penalties.apply(logits[batch.penalized], batch.penalty_slots)
        for processor in edits:
            processor.edit(logits, numbers, generated)
        return logits

    def _pick_masked(
        self,
        logits: torch.Tensor,
        batch: _Batch,
        numbers: npt.NDArray[np.int64],
        masks: Mapping[int, RowMask],
    ) -> torch.Tensor:
        """`_pick` under masks by place in the batch. Rows with few allowed ids draw among these alone: all others weigh
        nothing."""
        tokens = torch.empty(len(numbers), dtype=torch.int64)
        few = {place: mask.few for place, mask in masks.items() if mask.few is not None}
        others = [place for place in range(len(numbers)) if place not in few]
        if others:
            chosen = logits[others]  # a copy
            for row, place in zip(chosen, others, strict=True):
                if place in masks and masks[place].forbidden is not None:
                    row.masked_fill_(masks[place].forbidden, -torch.inf)
            rest = self._batch_of(tuple(batch.key[place] for place in others))
            tokens[others] = self._pick(chosen, rest, numbers[others])
        for place, ids in few.items():
            if len(ids) == 1:
                tokens[place] = int(ids[0])
            else:
                tokens[place] = self._pick_among(logits[place], int(numbers[place]), torch.from_numpy(ids))
        return tokens

    def _pick_among(self, logits: torch.Tensor, number: int, ids: torch.Tensor) -> torch.Tensor:
        """One row's token, logits [V], among `ids` [K] in ascending order."""
        params = self._rows[number].sampling_params
        chosen = logits[ids].float()[None]
        if params.is_greedy:
            return ids[kernels.argmax(chosen)[0]]
        row = np.array([number])
        uniform = torch.from_numpy(self._uniforms.at(row, self._generated[row]))
        filters = Filters.from_params([params], len(ids), self._device)
        if is_filtered(params):
            return ids[draw_filtered(chosen, filters, uniform)[0]]
        return ids[draw(chosen, filters.temperature, uniform)[0]]

    def _pick(self, logits: torch.Tensor, batch: _Batch, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        if batch.all_greedy:
            return kernels.argmax(logits)
        if batch.device_draw is not None:
            return batch.device_draw(logits)
        tokens = torch.empty(len(numbers), dtype=torch.int64, device=self._device)
        if len(batch.greedy):
            tokens[batch.greedy] = kernels.argmax(logits[batch.greedy])
        uniform = torch.from_numpy(self._uniforms.at(numbers, self._generated[numbers])).to(self._device)
        if len(batch.plain):
            tokens[batch.plain] = draw(logits[batch.plain].float(), batch.plain_temperature, uniform[batch.plain])
        if batch.filters is not None:
            chosen = logits[batch.filtered].float()
            tokens[batch.filtered] = draw_filtered(chosen, batch.filters, uniform[batch.filtered])
        return tokens


class _Batch:
    """Who is in a step and what each needs: int64 positions in the batch, by kind of row."""

    def __init__(
        self, key: tuple[int, ...], rows: Sequence[RunRow], penalties: Penalties, vocab_size: int, device: torch.device
    ) -> None:
        self.key = key
        params = [rows[number].sampling_params for number in key]

        def positions(wanted: Sequence[bool]) -> torch.Tensor:
            return upload(np.flatnonzero(wanted), device)

        self.all_greedy = all(p.is_greedy for p in params)
        self.greedy = positions([p.is_greedy for p in params])
        self.plain = positions([not p.is_greedy and not is_filtered(p) for p in params])
        self.filtered = positions([not p.is_greedy and is_filtered(p) for p in params])
        plain = [p for p in params if not p.is_greedy and not is_filtered(p)]
        filtered = [p for p in params if not p.is_greedy and is_filtered(p)]
        self.plain_temperature = Filters.from_params(plain, vocab_size, device).temperature
        self.filters = Filters.from_params(filtered, vocab_size, device) if filtered else None
        slots = [penalties.slots[number] for number in key if number in penalties.slots]
        self.penalized = positions([number in penalties.slots for number in key]) if slots else None
        self.penalty_slots = upload(np.array(slots, dtype=np.int64), device)
        self.report_rows = [number for number in key if rows[number].log_probabilities is not None]
        self.report_num_top = [rows[number].log_probabilities or 0 for number in self.report_rows]
        self._reported = positions([number in self.report_rows for number in key])
        self.device_draw: DeviceDraw | None = None
        self._vocab_size, self._device = vocab_size, device

    def draw_by(self, kernel: SamplingKernel, rows: Sequence[RunRow], generated: npt.NDArray[np.int64]) -> None:
        """From now on `kernel` draws, one step after the other. generated: int64 [all rows], tokens so far."""
        if not self.all_greedy:
            params = [rows[number].sampling_params for number in self.key]
            counters = generated[list(self.key)]
            self.device_draw = DeviceDraw(kernel, params, counters, self._vocab_size, self._device)

    def report(self, logits: torch.Tensor, tokens: torch.Tensor) -> TokenReport | None:
        if not self.report_rows:
            return None
        return TokenReport.of(logits[self._reported].float(), tokens[self._reported], max(self.report_num_top))


class _Uniforms:
    """The rows' random numbers, made some steps ahead. Token number g of a row always gets draw number g."""

    def __init__(self, rows: Sequence[RunRow]) -> None:
        self._seeds = [row.sampling_params.seed for row in rows]
        self._first = np.array([row.generated_length for row in rows], dtype=np.int64)
        self._block = np.empty((len(rows), 0), dtype=np.float64)

    def at(self, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """float64 [n]: for row numbers[i], which has generated[i] tokens so far."""
        offsets = generated - self._first[numbers]
        if offsets.max() >= self._block.shape[1]:
            self._first += self._block.shape[1]
            self._block = uniforms(self._seeds, self._first, _DRAWS_AHEAD)
            offsets = generated - self._first[numbers]
        assert ((offsets >= 0) & (offsets < _DRAWS_AHEAD)).all(), "rows of one run step together"
        drawn: npt.NDArray[np.float64] = self._block[numbers, offsets]
        return drawn

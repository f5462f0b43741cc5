"""The sampler of one run: from the logits of a step to one token a row. Used by the model runner.

Order of operations: logit bias; repetition, frequency and presence penalties; DRY; allowed tokens, bad words,
min-tokens and grammar masks; report of log probabilities; then argmax for greedy rows (ties: the lowest id), and
temperature, top-k, top-p, min-p, typical-p, XTC and one draw for the others.

Rows are grouped once, and again only when a row ends: a batch that is greedy throughout costs one argmax. State lives
for one run (tokens generated per row, penalty counts, last tokens) and is rebuilt from the rows by the next one.
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
from max_ray.engine.sampling.dry import DryPenalty
from max_ray.engine.sampling.grammar_masks import GrammarMasks, RowMask, has_grammar
from max_ray.engine.sampling.logits_processor import NO_TOKEN, LogitsProcessor
from max_ray.engine.sampling.logprobs import TokenReport, prompt_logprobs
from max_ray.engine.sampling.penalties import MinTokens, Penalties
from max_ray.engine.sampling.philox import uniforms
from max_ray.engine.sampling.token_edits import AllowedTokens, BadWords, LogitBias, rows_with
from max_ray.engine.sampling.truncation import Truncation, drawn_from_all, truncates
from max_ray.interfaces.context import LogProbabilities
from max_ray.interfaces.executor import RunRow

if TYPE_CHECKING:
    from max_ray.structured_output import GrammarCompiler

__all__ = ["NO_TOKEN", "Sampled", "Sampler", "needs_host", "prompt_logprobs"]

_DRAWS_AHEAD = 32  # random numbers made at once for each row
_TOKEN_WORD, _XTC_WORD = 0, 1  # of the generator's four words a draw


def needs_host(row: RunRow) -> bool:
    """Whether a row's next token depends on something that the host makes of the one before."""
    controls = row.sampling_params.logit_controls
    return has_grammar(row) or (controls is not None and controls.uses_dry)


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
        self._bias: LogitsProcessor | None = None
        self._processors: list[LogitsProcessor] = []
        if any(row.sampling_params.logit_controls is not None for row in rows):
            self._add_controls()
        if any(row.sampling_params.min_new_tokens for row in rows):
            self._processors.append(MinTokens(rows, vocab_size, device))
        self._grammar_masks: GrammarMasks | None = None
        if any(map(has_grammar, rows)):
            assert grammars is not None, "a run with structured output on an engine that was made without grammars"
            self._grammar_masks = GrammarMasks(
                rows, vocab_size, device, grammars, masks_when_drawn=self._kernel is None
            )
            self._processors.append(self._grammar_masks)
        self._uniforms = _Uniforms(rows, _TOKEN_WORD)
        self._xtc_uniforms = _Uniforms(rows, _XTC_WORD)
        self._needs_host = any(processor.needs_host_tokens for processor in self._processors)
        self._batch = self._batch_of(())

    def _add_controls(self) -> None:
        """The processors of the rows that have LogitControls, in the order of the file header."""
        rows, size, device = self._rows, self._vocab_size, self._device
        if biased := rows_with(rows, lambda c: bool(c.logit_bias)):
            self._bias = LogitBias(biased, size, device)
        if dry := rows_with(rows, lambda c: c.uses_dry):
            self._processors.append(DryPenalty(dry, rows, size, device))
        if allowed := rows_with(rows, lambda c: c.allowed_token_ids is not None):
            self._processors.append(AllowedTokens(allowed, size, device))
        if bad := rows_with(rows, lambda c: bool(c.bad_words)):
            self._processors.append(BadWords(bad, rows, size, device))

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
        for processor in self._processors:
            processor.observe(numbers, tokens)
        self._generated[numbers] += 1
        report = batch.report(logits, tokens)
        if self._grammar_masks is not None and (failed := self._grammar_masks.failed_among(key)):
            tokens = tokens.index_fill(0, upload(np.array(failed, dtype=np.int64), self._device), NO_TOKEN)
        return Sampled(tokens, report, batch.report_rows, batch.report_num_top)

    @property
    def needs_host(self) -> bool:
        """Whether each step's tokens must be given to `accept` before the next one is sampled."""
        return self._needs_host

    def num_forced(self, row_ids: Sequence[int]) -> int:
        """Tokens that must come next in these rows, whose last ones have been given to `accept`."""
        return 0 if self._grammar_masks is None else self._grammar_masks.num_forced(row_ids)

    def accept(self, row_ids: Sequence[int], tokens: Sequence[int]) -> dict[int, str] | None:
        """Takes the tokens of the last step, now that they are on the host. Gives the reasons of rows that got none."""
        errors: dict[int, str] = {}
        for processor in self._processors:
            if processor.needs_host_tokens:
                errors |= processor.accept(row_ids, tokens) or {}
        return errors or None

    def _batch_of(self, key: tuple[int, ...]) -> _Batch:
        batch = _Batch(key, self._rows, self._penalties, self._vocab_size, self._device)
        if self._kernel is not None:
            batch.draw_by(self._kernel, self._generated)
        return batch

    def _edit(self, logits: torch.Tensor, batch: _Batch, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        """Bias, penalties and masks; the caller's logits stay as they are."""
        generated = self._generated[numbers]
        edits = [processor for processor in self._processors if processor.is_due(numbers, generated)]
        is_biased = self._bias is not None and self._bias.is_due(numbers, generated)
        if batch.penalized is None and not edits and not is_biased:
            return logits
        logits = logits.to(torch.float32, copy=True)
        if self._bias is not None and is_biased:
            self._bias.edit(logits, numbers, generated)
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
        if truncates(params):
            xtc_uniform = torch.from_numpy(self._xtc_uniforms.at(row, self._generated[row]))
            chosen = Truncation([params], len(ids), self._device)(chosen, xtc_uniform)
            params = drawn_from_all(params)
        filters = Filters.from_params([params], len(ids), self._device)
        if is_filtered(params):
            return ids[draw_filtered(chosen, filters, uniform)[0]]
        return ids[draw(chosen, filters.temperature, uniform)[0]]

    def _pick(self, logits: torch.Tensor, batch: _Batch, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        if batch.all_greedy:
            return kernels.argmax(logits)
        if batch.truncation is not None:
            logits = self._truncated(logits, batch, batch.truncation, numbers)
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

    def _truncated(
        self, logits: torch.Tensor, batch: _Batch, truncation: Truncation, numbers: npt.NDArray[np.int64]
    ) -> torch.Tensor:
        """A copy in which the batch's truncated rows have lost tokens."""
        drawn = self._xtc_uniforms.at(numbers, self._generated[numbers])[batch.truncated_places]
        logits = logits.to(torch.float32, copy=True)
        rows = truncation(logits.index_select(0, batch.truncated), upload(drawn, self._device))
        return logits.index_copy_(0, batch.truncated, rows)


class _Batch:
    """Who is in a step and what each needs: int64 positions in the batch, by kind of row."""

    def __init__(
        self, key: tuple[int, ...], rows: Sequence[RunRow], penalties: Penalties, vocab_size: int, device: torch.device
    ) -> None:
        self.key = key
        params = [rows[number].sampling_params for number in key]
        self.truncated_places = [place for place, p in enumerate(params) if truncates(p)]
        self.truncation: Truncation | None = None
        if self.truncated_places:
            self.truncated = upload(np.array(self.truncated_places, dtype=np.int64), device)
            self.truncation = Truncation([params[place] for place in self.truncated_places], vocab_size, device)
            params = [drawn_from_all(p) if truncates(p) else p for p in params]
        self._params = params

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

    def draw_by(self, kernel: SamplingKernel, generated: npt.NDArray[np.int64]) -> None:
        """From now on `kernel` draws, one step after the other. generated: int64 [all rows], tokens so far."""
        if not self.all_greedy:
            counters = generated[list(self.key)]
            self.device_draw = DeviceDraw(kernel, self._params, counters, self._vocab_size, self._device)

    def report(self, logits: torch.Tensor, tokens: torch.Tensor) -> TokenReport | None:
        if not self.report_rows:
            return None
        return TokenReport.of(logits[self._reported].float(), tokens[self._reported], max(self.report_num_top))


class _Uniforms:
    """The rows' random numbers, made some steps ahead. Token number g of a row always gets draw number g.

    word: which of the generator's words; each is a sequence of its own.
    """

    def __init__(self, rows: Sequence[RunRow], word: int) -> None:
        self._word = word
        self._seeds = [row.sampling_params.seed for row in rows]
        self._first = np.array([row.generated_length for row in rows], dtype=np.int64)
        self._block = np.empty((len(rows), 0), dtype=np.float64)

    def at(self, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """float64 [n]: for row numbers[i], which has generated[i] tokens so far."""
        offsets = generated - self._first[numbers]
        if offsets.max() >= self._block.shape[1]:
            self._first += offsets.max() // _DRAWS_AHEAD * _DRAWS_AHEAD  # steps may have needed no draw
            self._block = uniforms(self._seeds, self._first, _DRAWS_AHEAD, self._word)
            offsets = generated - self._first[numbers]
        assert ((offsets >= 0) & (offsets < _DRAWS_AHEAD)).all(), "rows of one run step together"
        drawn: npt.NDArray[np.float64] = self._block[numbers, offsets]
        return drawn

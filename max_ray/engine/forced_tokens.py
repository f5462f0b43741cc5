"""Forced tokens: what a grammar leaves no choice about runs in one step, as a small prefill.

Where the text of a row must go on in one way (`", "age": ` of a JSON schema), its next run begins with these tokens
behind the last sampled one: the first step of a run is ragged anyway. The step gives them and the token after them. The
text is the same as token by token, and so are the random draws, which are numbered by the token's place.

A run ends early where a new one saves more than a step of the batch: its first step costs more than others do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from max_ray.interfaces import RunRow

if TYPE_CHECKING:
    from max_ray.structured_output import GrammarCompiler

MAX_FORCED = 32
"""Tokens that one row may be given in a step."""


def counts_forced(row: RunRow) -> bool:
    """Whether tokens of a row may come without a step of their own: nothing is reported of them, no penalty counts
    them, no logit is edited."""
    params = row.sampling_params
    is_edited = params.needs_penalties or params.logit_controls is not None
    return params.structured_output is not None and row.log_probabilities is None and not is_edited


def is_outdone(num_forced: int, num_rows: int) -> bool:
    """Whether a run should end for one that begins with forced tokens.

    Args:
        num_forced: Tokens that must come next, of all rows together.
        num_rows: Rows that go on.
    """
    return num_forced > max(1, num_rows)


def with_forced_tokens(
    rows: Sequence[RunRow], grammars: GrammarCompiler
) -> tuple[list[RunRow], Mapping[int, list[int]]]:
    """The rows of a run with their forced tokens among the active ones, and these by row.

    Args:
        rows: Rows of a run that has not begun. Their blocks cover all tokens that they may sample in it.
        grammars: Where the matchers of earlier runs are; a row without one is left as it is.
    """
    wanted = [number for number, row in enumerate(rows) if _can_be_prolonged(row)]
    if not wanted:
        return list(rows), {}
    found = grammars.in_mask_thread(lambda: {number: _forced(rows[number], grammars) for number in wanted}).result()
    forced = {number: tokens for number, tokens in found.items() if tokens}
    return [_prolonged(row, forced.get(number, [])) for number, row in enumerate(rows)], forced


def _can_be_prolonged(row: RunRow) -> bool:
    return len(row.active_tokens) == 1 and row.max_new_tokens > 1 and counts_forced(row)


def _forced(row: RunRow, grammars: GrammarCompiler) -> list[int]:
    spec, history = row.sampling_params.structured_output, row.history
    assert spec is not None
    assert history is not None
    tokens = grammars.forced_tokens(row.request_id, spec, history[row.prompt_length :].tolist())
    return tokens[: min(MAX_FORCED, row.max_new_tokens - 1)]


def _prolonged(row: RunRow, forced: list[int]) -> RunRow:
    if not forced:
        return row
    more = np.array(forced, dtype=np.int64)
    assert row.history is not None
    return replace(
        row,
        active_tokens=np.concatenate([row.active_tokens, more]),
        history=np.concatenate([row.history, more]),
        generated_length=row.generated_length + len(forced),
        max_new_tokens=row.max_new_tokens - len(forced),
    )

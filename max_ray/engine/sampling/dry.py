"""DRY ("don't repeat yourself"): a penalty on tokens that would continue a repetition of the text's end.

As in llama.cpp: where the last n tokens stood before, the token that followed them there gets a penalty that grows
with n. No repetition reaches over a breaker. The text is looked at on the host, so runs with such a row launch no step
ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from max_ray.driver import upload
from max_ray.engine.sampling.logits_processor import NO_TOKEN, LogitsProcessor
from max_ray.interfaces import LogitControls
from max_ray.interfaces.context import TokenBuffer
from max_ray.interfaces.executor import RunRow

_MAX_PENALTY = 1e30
_MAX_EXPONENT = 88.0  # of e: beyond it a penalty is more than a float32 holds, however long the repetition

Penalties = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


class DryPenalty(LogitsProcessor):
    """The penalties of one run's rows."""

    needs_host_tokens = True

    def __init__(
        self, rows: dict[int, LogitControls], all_rows: Sequence[RunRow], vocab_size: int, device: torch.device
    ) -> None:
        self._device = device
        self._texts: dict[int, TokenBuffer] = {}
        self._dry = {number: Dry(controls, vocab_size) for number, controls in rows.items()}
        for number in rows:
            history = all_rows[number].history
            assert history is not None, "a row with DRY came without its history"
            self._texts[number] = TokenBuffer(history)

    def is_due(self, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> bool:
        return any(number in self._dry for number in numbers.tolist())

    def edit(self, logits: torch.Tensor, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> None:
        places, tokens, values = [], [], []
        for place, number in enumerate(numbers.tolist()):
            if number in self._dry:
                ids, penalties = self._dry[number].penalties(self._texts[number].all)
                places.append(np.full(len(ids), place, dtype=np.int64))
                tokens.append(ids)
                values.append(-penalties)
        where = (upload(np.concatenate(places), self._device), upload(np.concatenate(tokens), self._device))
        logits.index_put_(where, upload(np.concatenate(values), self._device), accumulate=True)

    def accept(self, numbers: Sequence[int], tokens: Sequence[int]) -> None:
        for number, token in zip(numbers, tokens, strict=True):
            if number in self._texts and token != NO_TOKEN:
                self._texts[number].append(token)


class Dry:
    """One row's parameters, ready to be applied to a text."""

    def __init__(self, controls: LogitControls, vocab_size: int) -> None:
        self._multiplier = controls.dry_multiplier
        self._base = controls.dry_base
        self._allowed = controls.dry_allowed_length
        self._last_n = controls.dry_penalty_last_n
        grows = math.log(controls.dry_base)
        self._longest = self._allowed + (math.ceil(_MAX_EXPONENT / grows) if grows > 1e-6 else 0)
        self._vocab_size = vocab_size
        self._tails: dict[int, list[tuple[int, ...]]] = {}
        for head, *tail in controls.dry_breakers:
            self._tails.setdefault(head, []).append(tuple(tail))
        heads = [head for head in self._tails if 0 <= head < vocab_size]
        self._is_head = np.zeros(vocab_size, dtype=np.bool_)
        self._is_head[heads] = True

    def penalties(self, text: npt.NDArray[np.int64]) -> Penalties:
        """(tokens int64 [n], what is taken from their logits float32 [n]) after `text` [length]."""
        recent = text if self._last_n < 0 else text[max(0, len(text) - self._last_n) :]
        limit = min(len(recent), self._longest)
        if limit >= self._allowed:
            limit = min(limit, self._tokens_since_breaker(recent))
        if limit < self._allowed or len(recent) <= self._allowed:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        ends, lengths = repetitions(recent, limit)
        is_long = lengths >= self._allowed
        following = recent[ends[is_long] + 1]
        tokens, group = np.unique(following, return_inverse=True)
        longest = np.zeros(len(tokens), dtype=np.int64)
        np.maximum.at(longest, group, lengths[is_long])
        exponents = np.minimum(longest, self._longest) - self._allowed
        penalties = np.minimum(self._multiplier * np.power(self._base, exponents), _MAX_PENALTY)
        return tokens, penalties.astype(np.float32)

    def _tokens_since_breaker(self, recent: npt.NDArray[np.int64]) -> int:
        """How many tokens follow the last breaker; all of them without a breaker."""
        known = recent < self._vocab_size
        places = np.flatnonzero(known & self._is_head[np.where(known, recent, 0)])
        for place in places[::-1].tolist():
            tails = [len(tail) for tail in self._tails[int(recent[place])] if _follows(recent, place, tail)]
            if tails:
                return len(recent) - 1 - int(place) - max(tails)
        return len(recent)


def repetitions(text: npt.NDArray[np.int64], limit: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where the end of a text stood in it before.

    Args:
        text: int64 [n], n >= 1.
        limit: Longest repetition that counts, at least 1.

    Returns:
        (places of the last tokens of the repetitions, their lengths), int64 each.
    """
    ends = np.flatnonzero(text[:-1] == text[-1])
    lengths = np.ones(len(ends), dtype=np.int64)
    alive = np.arange(len(ends))
    for length in range(1, limit):
        alive = alive[ends[alive] >= length]
        alive = alive[text[ends[alive] - length] == text[-1 - length]]
        if not len(alive):
            break
        lengths[alive] += 1
    return ends, lengths


def _follows(text: npt.NDArray[np.int64], place: int, tail: Sequence[int]) -> bool:
    return tuple(text[place + 1 : place + 1 + len(tail)].tolist()) == tuple(tail)

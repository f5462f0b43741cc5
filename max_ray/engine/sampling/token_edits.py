"""Edits of single logits: bias, allowed tokens, bad words. They lie on the device and never wait for the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from max_ray.driver import upload
from max_ray.engine.sampling.logits_processor import LogitsProcessor
from max_ray.engine.sampling.places import Places
from max_ray.engine.sampling.recent_tokens import RecentTokens
from max_ray.interfaces import LogitControls
from max_ray.interfaces.executor import RunRow

_ANY_TOKEN = -2  # in place of a token of a shorter word's head


def rows_with(rows: Sequence[RunRow], wanted: Callable[[LogitControls], bool]) -> dict[int, LogitControls]:
    """Row number -> controls, of the rows that sample and whose controls ask for something."""
    found = {}
    for number, row in enumerate(rows):
        controls = row.sampling_params.logit_controls
        if controls is not None and row.samples and wanted(controls):
            found[number] = controls
    return found


class LogitBias(LogitsProcessor):
    """Adds a number to the logits of some tokens."""

    def __init__(self, biases: dict[int, LogitControls], vocab_size: int, device: torch.device) -> None:
        self._rows = {
            number: [(token, value) for token, value in controls.logit_bias if token < vocab_size]
            for number, controls in biases.items()
        }
        self._device = device
        self._key: tuple[int, ...] = ()
        self._where: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def is_due(self, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> bool:
        return any(number in self._rows for number in numbers.tolist())

    def edit(self, logits: torch.Tensor, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> None:
        key = tuple(numbers.tolist())
        if key != self._key or self._where is None:
            self._key, self._where = key, self._upload(key)
        places, tokens, values = self._where
        logits.index_put_((places, tokens), values, accumulate=True)

    def _upload(self, key: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = [(place, *bias) for place, number in enumerate(key) for bias in self._rows.get(number, ())]
        places, tokens, values = zip(*found, strict=True) if found else ((), (), ())
        return (
            upload(np.array(places, dtype=np.int64), self._device),
            upload(np.array(tokens, dtype=np.int64), self._device),
            upload(np.array(values, dtype=np.float32), self._device),
        )


class AllowedTokens(LogitsProcessor):
    """Forbids all tokens that are not in a row's list. Memory: one byte a token of the vocabulary, for each row."""

    def __init__(self, rows: dict[int, LogitControls], vocab_size: int, device: torch.device) -> None:
        self._places = Places(list(rows), device)
        forbidden = np.ones((len(rows), vocab_size), dtype=np.bool_)
        for line, controls in zip(forbidden, rows.values(), strict=True):
            line[[token for token in controls.allowed_token_ids or () if token < vocab_size]] = False
        self._forbidden = upload(forbidden, device)

    def is_due(self, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> bool:
        return self._places.any_of(numbers)

    def edit(self, logits: torch.Tensor, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> None:
        places, slots = self._places.of(numbers)
        masked = logits.index_select(0, places).masked_fill_(self._forbidden.index_select(0, slots), -torch.inf)
        logits.index_copy_(0, places, masked)


class BadWords(LogitsProcessor):
    """Forbids the last token of a word where the tokens before it were generated just now.

    heads: int64 [K, L], the words without their last tokens, _ANY_TOKEN on the left of shorter ones. last: int64 [K].
    """

    def __init__(
        self, words: dict[int, LogitControls], rows: Sequence[RunRow], vocab_size: int, device: torch.device
    ) -> None:
        self._device = device
        self._words = {number: _within(controls.bad_words, vocab_size) for number, controls in words.items()}
        self._places = Places(list(words), device)
        length = max((len(word) - 1 for found in self._words.values() for word in found), default=0)
        self._length = length
        self._recent = RecentTokens([_generated(rows[number]) for number in words], length, device)
        self._key: tuple[int, ...] = ()
        self._of_batch: tuple[torch.Tensor, ...] = ()

    def is_due(self, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> bool:
        return self._places.any_of(numbers)

    def edit(self, logits: torch.Tensor, numbers: npt.NDArray[np.int64], generated: npt.NDArray[np.int64]) -> None:
        key = tuple(numbers.tolist())
        if key != self._key:
            self._key, self._of_batch = key, self._upload(key)
        places, slots, heads, last = self._of_batch
        is_next = ((self._recent.tokens[slots] == heads) | (heads == _ANY_TOKEN)).all(1)
        bans = torch.zeros(len(places), device=self._device).masked_fill_(is_next, -torch.inf)
        logits.index_put_((places, last), bans, accumulate=True)

    def observe(self, numbers: npt.NDArray[np.int64], tokens: torch.Tensor) -> None:
        if self._length and self._places.any_of(numbers):
            places, slots = self._places.of(numbers)
            self._recent.append(slots, tokens.index_select(0, places))

    def _upload(self, key: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        slots = {number: slot for slot, number in enumerate(self._words)}
        lines = [(p, slots[number], word) for p, number in enumerate(key) for word in self._words.get(number, ())]
        heads = [[_ANY_TOKEN] * (self._length + 1 - len(word)) + list(word[:-1]) for _, _, word in lines]
        columns = (
            [place for place, _, _ in lines],
            [slot for _, slot, _ in lines],
            np.array(heads, dtype=np.int64).reshape(len(lines), self._length),
            [word[-1] for _, _, word in lines],
        )
        return tuple(upload(np.array(column, dtype=np.int64), self._device) for column in columns)


def _within(words: Iterable[tuple[int, ...]], vocab_size: int) -> list[tuple[int, ...]]:
    return [word for word in words if word and max(word) < vocab_size and min(word) >= 0]


def _generated(row: RunRow) -> npt.NDArray[np.int64]:
    """Tokens of a row that were generated before the run; none where its words need none."""
    return np.empty(0, dtype=np.int64) if row.history is None else row.history[row.prompt_length :]

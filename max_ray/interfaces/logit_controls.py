"""LogitControls: sampling parameters that few requests have, about single tokens and about the text so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from max_ray.errors import InputError

MAX_BIASED_TOKENS = 1024
MAX_ALLOWED_TOKENS = 16384
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_TOKENS = 128
MAX_WINDOW = 2**20
"""Tokens of a window of `repeat_last_n`; -1 stands for the whole text."""

TokenSequence = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LogitControls:
    """Sampling parameters by token ids. Immutable and picklable. The defaults change nothing.

    Attributes:
        logit_bias: (token, number that is added to its logit). -inf forbids the token.
        allowed_token_ids: All other tokens are forbidden; None allows all.
        bad_words: Sequences of tokens. The last token of each is forbidden behind the others, among generated tokens.
        repeat_last_n: How many of the last tokens the penalties look at; -1: all.
        typical_p: Locally typical sampling (Meister et al. 2022): the tokens whose information is nearest to the
            entropy, as many as hold this share of the probability. 1 is off.
        xtc_probability: How often XTC ("exclude top choices") applies: then all tokens of at least `xtc_threshold`
            are removed but the least likely of them. 0 is off.
        xtc_threshold: A probability. Above 0.5 XTC is off.
        dry_multiplier: DRY ("don't repeat yourself"): multiplier * base ** (n - allowed_length) is taken from the
            logit of a token that would continue a repetition of n >= allowed_length tokens. 0 is off.
        dry_base: At least 1.
        dry_allowed_length: Longest repetition without a penalty, plus one.
        dry_penalty_last_n: How many of the last tokens DRY looks at; -1: all, 0: none.
        dry_breakers: Sequences of tokens over which no repetition reaches.

    Raises:
        InputError: A value is out of range. `param` has its name.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: TokenSequence | None = None
    bad_words: tuple[TokenSequence, ...] = ()
    repeat_last_n: int = -1
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_breakers: tuple[TokenSequence, ...] = ()

    def __post_init__(self) -> None:
        self._check_tokens()
        for name in ("typical_p", "xtc_probability", "xtc_threshold", "dry_multiplier", "dry_base"):
            self._check(math.isfinite(getattr(self, name)), name, "a finite number")
        self._check(-1 <= self.repeat_last_n <= MAX_WINDOW, "repeat_last_n", f"from -1 (all) to {MAX_WINDOW}")
        self._check(0 < self.typical_p <= 1, "typical_p", "in (0, 1]")
        self._check(0 <= self.xtc_probability <= 1, "xtc_probability", "in [0, 1]")
        self._check(0 <= self.xtc_threshold <= 1, "xtc_threshold", "in [0, 1]")
        self._check(self.dry_multiplier >= 0, "dry_multiplier", "at least 0")
        self._check(self.dry_base >= 1, "dry_base", "at least 1")
        self._check(1 <= self.dry_allowed_length < 2**31, "dry_allowed_length", "from 1 to 2147483647")
        self._check(-1 <= self.dry_penalty_last_n < 2**31, "dry_penalty_last_n", "from -1 (all) to 2147483647")

    @property
    def changes_anything(self) -> bool:
        """Whether a row with these may get another token than one without."""
        edits = self.logit_bias or self.allowed_token_ids is not None or self.bad_words or self.uses_dry
        return bool(edits) or self.truncates or self.repeat_last_n != -1

    @property
    def uses_dry(self) -> bool:
        """Whether some token may get a penalty for a repetition."""
        return self.dry_multiplier > 0 and self.dry_penalty_last_n != 0

    @property
    def uses_xtc(self) -> bool:
        """Whether XTC may remove a token."""
        return self.xtc_probability > 0 and self.xtc_threshold <= 0.5

    @property
    def truncates(self) -> bool:
        """Whether a draw may lose tokens beside those that top-k, top-p and min-p remove."""
        return self.typical_p < 1 or self.uses_xtc

    @property
    def needs_history(self) -> bool:
        """Whether edits depend on the tokens so far. (Penalties say so themselves.)"""
        return self.uses_dry or any(len(word) > 1 for word in self.bad_words)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InputError for an id outside the vocabulary."""
        self._check_ids([token for token, _ in self.logit_bias], vocab_size, "logit_bias")
        self._check_ids(self.allowed_token_ids or (), vocab_size, "allowed_token_ids")
        self._check_ids([token for word in self.bad_words for token in word], vocab_size, "bad_words")

    def _check(self, ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise InputError(f"{name} must be {rule}, not {getattr(self, name)!r}.", param=name)

    def _check_tokens(self) -> None:
        values = [value for _, value in self.logit_bias]
        _check_count(self.logit_bias, MAX_BIASED_TOKENS, "logit_bias")
        if not all(-100 <= value <= 100 or value == -math.inf for value in values):
            raise InputError("A logit_bias must be a number from -100 to 100.", param="logit_bias")
        if self.allowed_token_ids is not None:
            _check_count(self.allowed_token_ids, MAX_ALLOWED_TOKENS, "allowed_token_ids")
            if not self.allowed_token_ids:
                raise InputError("allowed_token_ids must have an id: no token is allowed.", param="allowed_token_ids")
        _check_count(self.bad_words, MAX_BAD_WORDS, "bad_words")
        if not all(0 < len(word) <= MAX_BAD_WORD_TOKENS for word in self.bad_words):
            raise InputError(f"A bad word must have 1 to {MAX_BAD_WORD_TOKENS} tokens.", param="bad_words")

    def _check_ids(self, ids: Sequence[int], vocab_size: int, name: str) -> None:
        outside = next((token for token in ids if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise InputError(
                f"Token id {outside} is outside the model's vocabulary, 0 to {vocab_size - 1}.", param=name
            )


def _check_count(values: Sequence[object], most: int, name: str) -> None:
    if len(values) > most:
        raise InputError(f"{name} has {len(values)} entries, more than {most}.", param=name)

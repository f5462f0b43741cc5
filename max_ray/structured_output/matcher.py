"""GrammarMatcher: where one request stands in its grammar, and which tokens may come next."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from max_ray.errors import StructuredOutputError

SLOW_MASK_SECONDS = 0.05
MAX_SLOW_MASKS = 16
_NO_TOKEN = "The grammar allows no token here: the vocabulary cannot write what comes next."


class GrammarMatcher:
    """The state of one request. A function of the grammar and of the tokens generated so far, nothing else.

    Args:
        matcher: The library's matcher at the beginning of the grammar; owned by this object from now on.
        stop_ids: Tokens that end the text. They are allowed exactly where the grammar may end.
        vocab_size: V, one more than the highest token id.
    """

    def __init__(self, matcher: LLMatcher, stop_ids: Iterable[int], vocab_size: int) -> None:
        self._matcher = matcher
        self._stop_ids = frozenset(stop_ids)
        in_mask = sorted(i for i in self._stop_ids if 0 <= i < vocab_size)
        self._words = np.array([i // 32 for i in in_mask], dtype=np.int64)
        self._bits = np.array([1 << (i % 32) for i in in_mask], dtype=np.uint32)
        self._num_slow = 0
        self.tokens: list[int] = []

    @property
    def is_done(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        """Whether the text so far is a whole one."""
        return bool(self._matcher.is_accepting())

    def fill_mask(self, mask: npt.NDArray[np.uint32]) -> None:
        """Writes which tokens may come next.

        Args:
            mask: uint32 [ceil(V / 32)], contiguous; bit i % 32 of word i // 32 is set where token i is allowed.

        Raises:
            StructuredOutputError: The grammar allows no token, exceeds its limits, or its masks stay slow.
        """
        start = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._count_if_slow(time.thread_time() - start)
        self._check()
        np.bitwise_and.at(mask, self._words, ~self._bits)
        if self.may_end:
            np.bitwise_or.at(mask, self._words, self._bits)
        if not mask.any():
            raise StructuredOutputError(_NO_TOKEN)

    def advance(self, tokens: Sequence[int]) -> None:
        """Takes generated tokens in. A stop token ends the text and changes nothing.

        Raises:
            StructuredOutputError: The grammar does not allow them, or exceeds its limits.
        """
        if not tokens:
            return
        ends = tokens[-1] in self._stop_ids
        text = list(tokens[:-1] if ends else tokens)
        num_consumed = self._matcher.try_consume_tokens(text)
        self._check()
        if num_consumed < len(text):
            raise StructuredOutputError("The grammar does not allow the tokens that were generated.")
        self.tokens += text

    def forced_tokens(self) -> list[int]:
        """Tokens that must come next in any text that matches; often none. No token that ends the text."""
        forced = [int(i) for i in self._matcher.compute_ff_tokens()]
        return list(takewhile(lambda token: token not in self._stop_ids, forced))

    def _count_if_slow(self, seconds: float) -> None:
        self._num_slow += seconds > SLOW_MASK_SECONDS
        if self._num_slow > MAX_SLOW_MASKS:
            raise StructuredOutputError(
                f"The grammar is too complex: {self._num_slow} of its steps took more than "
                f"{SLOW_MASK_SECONDS * 1000:.0f} ms each."
            )

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = error_line(self._matcher.get_error())
            is_stuck = reason.startswith("NoExtension")
            raise StructuredOutputError(_NO_TOKEN if is_stuck else f"The grammar cannot be followed: {reason}")


def error_line(message: Any) -> str:
    """The library's message in one line, without its picture of the parser's state."""
    text = str(message).split("<state>")[0].replace("<non-verbose/>", "")
    return " ".join(text.split())[:300]

"""Reasoning before an answer: the markers around it, a budget of tokens for it, and a grammar for what follows.

    undecided --opener--> inside --closer, or the budget is used up and the closer is forced--> answer

A model that begins with something else than the opener is in its answer at once. The state is a function of the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from max_ray.errors import StructuredOutputError
from max_ray.interfaces.grammar import GrammarSpec
from max_ray.structured_output.matcher import GrammarMatcher
from max_ray.structured_output.vocabulary import TokenVocabulary

KIND: Literal["reasoning"] = "reasoning"
_Mask = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Reasoning:
    """What a request asks of the reasoning and of the answer behind it.

    Args:
        opener: The text that begins the reasoning.
        closer: The text that ends it.
        is_open: Whether the prompt has begun it.
        budget: Tokens of reasoning after which the closer is forced; None for any number.
        answer: The grammar of the answer; None for any text.
    """

    opener: str
    closer: str
    is_open: bool
    budget: int | None = None
    answer: GrammarSpec | None = None

    def spec(self) -> GrammarSpec:
        """As a request carries it."""
        return GrammarSpec(KIND, json.dumps(asdict(self)))

    @classmethod
    def of(cls, spec: GrammarSpec) -> Reasoning:
        """What a spec of this kind says."""
        fields: dict[str, Any] = json.loads(spec.text)
        answer = fields.pop("answer")
        return cls(**fields, answer=None if answer is None else GrammarSpec(**answer))


class MarkerTokens:
    """The tokens of a vocabulary around markers; what was found is kept.

    Args:
        vocabulary: Of the model.
    """

    def __init__(self, vocabulary: TokenVocabulary) -> None:
        self.vocabulary = vocabulary
        self._overruns: dict[tuple[bytes, int], _Mask] = {}
        self._ids: dict[str, list[int]] = {}

    @property
    def num_words(self) -> int:
        """Length of a mask."""
        return -(-len(self.vocabulary.tokens) // 32)

    def ids_of(self, marker: str) -> list[int]:
        """The tokens that write a marker."""
        if marker not in self._ids:
            self._ids[marker] = self.vocabulary.encode(marker)
        return self._ids[marker]

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to the text."""
        return self.vocabulary.tokens[token] if 0 <= token < len(self.vocabulary.tokens) else b""

    def overruns(self, marker: bytes, num_written: int) -> _Mask:
        """A mask of the tokens that complete a marker and go on behind it.

        Args:
            marker: The marker.
            num_written: So many bytes of it are written.
        """
        key = marker, num_written
        if key not in self._overruns:
            rest = marker[num_written:]
            ids = [
                i
                for i, token in enumerate(self.vocabulary.tokens)
                if (token.startswith(rest) and token != rest) or (marker in token and not token.endswith(marker))
            ]
            self._overruns[key] = _bits(ids, self.num_words)
        return self._overruns[key]


def _bits(ids: Iterable[int], num_words: int) -> _Mask:
    mask = np.zeros(num_words, dtype=np.uint32)
    for i in ids:
        mask[i // 32] |= np.uint32(1 << (i % 32))
    return mask


class ReasoningMatcher:
    """The state of one request: its reasoning, and then its answer. Has the methods of GrammarMatcher.

    Args:
        reasoning: What the request asks for.
        make_answer: Makes the matcher of the answer's grammar; called where there is one.
        markers: Of the model's vocabulary.
        stop_ids: Tokens that end the text.
    """

    def __init__(
        self,
        reasoning: Reasoning,
        make_answer: Callable[[GrammarSpec], GrammarMatcher],
        markers: MarkerTokens,
        stop_ids: Iterable[int],
    ) -> None:
        self.tokens: list[int] = []
        self._reasoning = reasoning
        self._markers = markers
        self._stop_ids = frozenset(stop_ids)
        self._stops = _bits((i for i in self._stop_ids if 0 <= i < 32 * markers.num_words), markers.num_words)
        self._answer = None if reasoning.answer is None else make_answer(reasoning.answer)
        self._closer = reasoning.closer.encode()
        self._forced: list[int] = []  # the rest of a marker that is being written
        self._head = b""  # of an answer that may turn out to be the opener
        self._tail = b""  # of the reasoning: what may be the beginning of the closer
        self._num_thought = 0
        self._step: Callable[[int], None] = self._begin
        self._then: Callable[[], None] = self._leave
        if reasoning.is_open:
            self._enter()

    @property
    def may_end(self) -> bool:
        """Whether the text so far is a whole one."""
        if self._answer is None:
            return not self._forced
        return self._step == self._go_on and self._answer.may_end

    @property
    def is_done(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._step == self._go_on and self._answer is not None and self._answer.is_done

    def fill_mask(self, mask: _Mask) -> None:
        """See GrammarMatcher."""
        if self._forced:
            mask[:] = _bits(self._forced[:1], len(mask))
        elif self._step == self._think:
            self._fill_inside(mask)
        elif self._answer is None:
            mask[:] = 0xFFFFFFFF
        else:
            self._answer.fill_mask(mask)
            if self._step == self._begin and self._first_of_opener is not None:
                mask |= _bits([self._first_of_opener], len(mask))

    def advance(self, tokens: Sequence[int]) -> None:
        """See GrammarMatcher."""
        for token in tokens:
            if token in self._stop_ids:
                return
            if self._forced:
                self._write(token)
            else:
                self._step(token)
            self.tokens.append(token)

    def forced_tokens(self) -> list[int]:
        """See GrammarMatcher."""
        if self._forced:
            return list(self._forced)
        return self._answer.forced_tokens() if self._answer is not None and self._step == self._go_on else []

    def _fill_inside(self, mask: _Mask) -> None:
        mask[:] = 0xFFFFFFFF
        if self._answer is not None:
            mask &= ~self._markers.overruns(self._closer, _length_begun(self._tail, self._closer))
            mask &= ~self._stops

    @cached_property
    def _first_of_opener(self) -> int | None:
        """The token that begins the opener, where the answer's grammar cannot begin with it."""
        assert self._answer is not None, "a text without a grammar is told by its bytes"
        first = self._markers.ids_of(self._reasoning.opener)[0]
        mask = np.zeros(self._markers.num_words, dtype=np.uint32)
        self._answer.fill_mask(mask)
        return None if mask[first // 32] >> (first % 32) & 1 else first

    # What a token does, by state.

    def _begin(self, token: int) -> None:
        opener = self._markers.ids_of(self._reasoning.opener)
        if self._answer is not None:
            if token == self._first_of_opener:
                self._force(opener[1:], then=self._enter)
            else:
                self._step = self._go_on
                self._go_on(token)
            return
        self._head += self._markers.bytes_of(token)
        head, whole = self._head.lstrip(), self._reasoning.opener.encode()
        if [token] == opener or head.startswith(whole):
            self._enter()
        elif not whole.startswith(head):
            self._step = self._go_on

    def _think(self, token: int) -> None:
        text = self._tail + self._markers.bytes_of(token)
        self._num_thought += 1
        if self._closer in text or [token] == self._markers.ids_of(self._reasoning.closer):
            self._step = self._go_on
            return
        self._tail = text[-len(self._closer) + 1 :] if len(self._closer) > 1 else b""
        self._end_when_used_up()

    def _go_on(self, token: int) -> None:
        if self._answer is not None:
            self._answer.advance([token])

    def _write(self, token: int) -> None:
        if token != self._forced.pop(0):
            raise StructuredOutputError("Another token was generated than the reasoning's budget allows.")
        if not self._forced:
            self._then()

    def _enter(self) -> None:
        self._step = self._think
        self._end_when_used_up()

    def _end_when_used_up(self) -> None:
        budget = self._reasoning.budget
        if budget is not None and self._num_thought >= budget:
            self._force(self._markers.ids_of(self._reasoning.closer), then=self._leave)

    def _leave(self) -> None:
        self._step = self._go_on

    def _force(self, tokens: Sequence[int], then: Callable[[], None]) -> None:
        self._forced, self._then = list(tokens), then
        if not tokens:
            then()


def _length_begun(text: bytes, marker: bytes) -> int:
    """Bytes of a marker that stand at the end of a text."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)

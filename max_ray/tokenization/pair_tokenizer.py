"""From a query and a document to the tokens of one row, for models that score the two together.

`PairTokenizer` puts them side by side as the tokenizer's files say ([CLS] a [SEP] b [SEP]); `JudgeTokenizer` writes the
question that Qwen3-Reranker is trained to answer with yes or no. Names of special tokens in the texts are text.
"""

from __future__ import annotations

import asyncio
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from max_ray.errors import ConfigError, InputError, InputTooLongError
from max_ray.interfaces import EmbeddingsContext, ScoreRequest
from max_ray.tokenization.tokenizer import INLINE_CHARACTERS, LONG_TOKEN_CHARACTERS, TextTokenizer, TokenArray

_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_BEHIND = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


class PairTokenizer(TextTokenizer):
    """Tokenizer of one local model folder, for the task of scores.

    Args:
        model_path: The folder.
        max_length: Tokens of a pair, special ones included.

    Raises:
        ConfigError: The tokenizer is not a fast one. Also what TextTokenizer raises.
    """

    takes_instruction = False

    def __init__(self, model_path: str | Path, *, max_length: int, **options: Any) -> None:
        super().__init__(model_path, max_length=max_length, **options)
        if self._backend is None:
            raise ConfigError(f"{model_path}: scores need a tokenizer.json, which this folder lacks.")
        self._fast: Any = self._backend
        self._fast.encode_special_tokens = True

    async def new_context(  # type: ignore[override]  # each task has its own requests
        self, request: ScoreRequest
    ) -> EmbeddingsContext:
        """The context of a pair. Long texts are encoded in a thread.

        Raises:
            InputTooLongError: The pair exceeds the model's length, and the request does not have it cut.
            InputError: A text is not Unicode, or the request gives an instruction that the model does not take.
        """
        if request.instruction is not None and not self.takes_instruction:
            raise InputError("This model takes no instruction. Leave it out.", param="instruction")
        is_short = len(request.query) + len(request.document) <= INLINE_CHARACTERS
        ids = self._pair_ids(request) if is_short else await asyncio.to_thread(self._pair_ids, request)
        return EmbeddingsContext(request.request_id, ids, request.model_name)

    def _pair_ids(self, request: ScoreRequest) -> TokenArray:
        """Without `Encoding.truncate` and `post_process`: they make every part that is cut off of one text, with every
        part of the other."""
        first, second = self._text_ids_of(request.query), self._text_ids_of(request.document)
        before, between, behind = self._frame
        room = self._room(request, len(before) + len(between) + len(behind), len(first) + len(second))
        if room is not None:
            lengths = _longest_first(len(first), len(second), room)
            first, second = first[: lengths[0]], second[: lengths[1]]
        return np.array([*before, *first, *between, *second, *behind], dtype=np.int64)

    @cached_property
    def _frame(self) -> tuple[list[int], list[int], list[int]]:
        """Special tokens before, between and behind the two texts: as around two short ones."""
        first, second = (self._fast.encode(text, add_special_tokens=False) for text in "ab")
        ids = self._fast.post_process(first, second).ids
        begin = _place(ids, first.ids, 0)
        end = begin + len(first.ids)
        second_begin = _place(ids, second.ids, end)
        return ids[:begin], ids[end:second_begin], ids[second_begin + len(second.ids) :]

    def _room(self, request: ScoreRequest, num_special: int, num_tokens: int) -> int | None:
        """Tokens that are left for the texts where they must be cut; None where they fit.

        Raises InputTooLongError, and InputError where nothing would be left.
        """
        most = self.max_length if request.max_tokens is None else min(request.max_tokens, self.max_length)
        if num_special + num_tokens <= most:
            return None
        if request.max_tokens is None:
            raise InputTooLongError(num_special + num_tokens, self.max_length)
        if most <= num_special:
            raise InputError(
                f"truncate_prompt_tokens={most} leaves no token for the texts: {num_special} are the model's own.",
                param="truncate_prompt_tokens",
            )
        return most - num_special

    def _text_ids_of(self, text: str) -> list[int]:
        """Of a text alone. Of megabytes that cannot fit, a beginning is as good: it is too long however it goes on."""
        head = text[: LONG_TOKEN_CHARACTERS * self.max_length]
        try:
            ids: list[int] = self._fast.encode(head, add_special_tokens=False).ids
            if len(head) < len(text) and len(ids) <= 2 * self.max_length:
                ids = self._fast.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise InputError("The text holds half of a surrogate pair, which is not Unicode.") from None
        return ids


class JudgeTokenizer(PairTokenizer):
    """The same for Qwen3-Reranker. The question's frame is never cut."""

    takes_instruction = True

    def __init__(self, model_path: str | Path, *, max_length: int, **options: Any) -> None:
        super().__init__(model_path, max_length=max_length, **options)
        self._fast.encode_special_tokens = False
        self._before, self._behind = (self.encode_text(text, False) for text in (_BEFORE, _BEHIND))
        self._fast.encode_special_tokens = True

    def _pair_ids(self, request: ScoreRequest) -> TokenArray:
        instruction = _INSTRUCTION if request.instruction is None else request.instruction
        text = f"<Instruct>: {instruction}\n<Query>: {request.query}\n<Document>: {request.document}"
        ids = self._text_ids_of(text)
        room = self._room(request, len(self._before) + len(self._behind), len(ids))
        return np.concatenate([self._before, np.array(ids[:room], dtype=np.int64), self._behind])


def _place(ids: list[int], part: list[int], start: int) -> int:
    """Where `part` lies in `ids`, from `start` on."""
    return next(i for i in range(start, len(ids)) if ids[i : i + len(part)] == part)


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two texts after tokens were taken from the longer one until both fit, as Hugging Face does."""
    shorter = min(first, second)
    kept = (shorter, room - shorter) if 2 * shorter <= room else (room // 2, room - room // 2)
    return kept if first <= second else (kept[1], kept[0])

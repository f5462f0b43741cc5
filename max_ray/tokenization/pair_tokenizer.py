"""From a query and a document to the tokens of one row, for models that score the two together.

`PairTokenizer` puts them side by side as the tokenizer's files say ([CLS] a [SEP] b [SEP]); `JudgeTokenizer` writes the
question that Qwen3-Reranker is trained to answer with yes or no. Names of special tokens in the texts are text.
"""

from __future__ import annotations

import asyncio
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
        first, second = self._encoding(request.query), self._encoding(request.document)
        room = self._room(request, self._fast.num_special_tokens_to_add(True), len(first) + len(second))
        if room is not None:
            for encoding, length in zip((first, second), _longest_first(len(first), len(second), room), strict=True):
                encoding.truncate(length)
        return np.asarray(self._fast.post_process(first, second).ids, dtype=np.int64)

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

    def _encoding(self, text: str) -> Any:
        """Of a text alone. Of megabytes that cannot fit, a beginning is as good: it is too long however it goes on."""
        head = text[: LONG_TOKEN_CHARACTERS * self.max_length]
        try:
            encoding = self._fast.encode(head, add_special_tokens=False)
            if len(head) < len(text) and len(encoding) <= 2 * self.max_length:
                encoding = self._fast.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise InputError("The text holds half of a surrogate pair, which is not Unicode.") from None
        return encoding


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
        encoding = self._encoding(text)
        room = self._room(request, len(self._before) + len(self._behind), len(encoding))
        if room is not None:
            encoding.truncate(room)
        return np.concatenate([self._before, np.asarray(encoding.ids, dtype=np.int64), self._behind])


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two texts after tokens were taken from the longer one until both fit, as Hugging Face does."""
    shorter = min(first, second)
    kept = (shorter, room - shorter) if 2 * shorter <= room else (room // 2, room - room // 2)
    return kept if first <= second else (kept[1], kept[0])

"""EmbeddingsTokenizer: from an embeddings request to its context, as the model's sentence-transformers files say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from max_ray.errors import InputError, InputTooLongError
from max_ray.interfaces import EmbeddingsContext, EmbeddingsGenerationRequest
from max_ray.sentence_files import SentenceFiles
from max_ray.tokenization.tokenizer import INLINE_CHARACTERS, LONG_TOKEN_CHARACTERS, TextTokenizer, TokenArray, id_array

EmbeddingsValidator = Callable[[EmbeddingsContext], None]


class EmbeddingsTokenizer(TextTokenizer):
    """Tokenizer of one local model folder, for the embeddings task.

    max_length: tokens of one input, special ones included. context_validators: called with each new context; each may
    raise InputError. Raises what TextTokenizer and SentenceFiles.read raise.
    """

    def __init__(
        self, model_path: str | Path, *, max_length: int, context_validators: Sequence[EmbeddingsValidator] = ()
    ) -> None:
        super().__init__(model_path, max_length=max_length)
        files = SentenceFiles.read(Path(model_path), default_pooling="mean")
        self._prefix, self._lower_case = files.default_prompt, files.lower_case
        self._validators = tuple(context_validators)

    async def new_context(  # type: ignore[override]  # each task has its own requests
        self, request: EmbeddingsGenerationRequest
    ) -> EmbeddingsContext:
        """The context of a request. Long texts are encoded in a thread.

        Raises InputTooLongError (unless the request truncates), and InputError for an empty input, an id outside the
        vocabulary, or text that is not Unicode.
        """
        if isinstance(request.input, str):
            short = len(request.input) <= INLINE_CHARACTERS
            ids = self._ids_of(request) if short else await asyncio.to_thread(self._ids_of, request)
        else:
            ids = id_array(request.input, "input")
        if not len(ids) or request.input == "":
            raise InputError("The input is empty. Give at least one character, or one token.", param="input")
        self._check_range(ids, "input")
        if len(ids) > self.max_length:
            if not request.truncate:
                raise InputTooLongError(len(ids), self.max_length)
            ids = ids[: self.max_length]
        context = EmbeddingsContext(request.request_id, ids, request.model_name)
        for validate in self._validators:
            validate(context)
        return context

    def _ids_of(self, request: EmbeddingsGenerationRequest) -> TokenArray:
        """Ids of a text with its special tokens; at most max_length of them where the request truncates. Megabytes
        that cannot fit are not encoded whole: a beginning with twice the tokens is longer however the text goes on."""
        text = self._prefix + str(request.input)
        text = text.lower() if self._lower_case else text
        head = text[: LONG_TOKEN_CHARACTERS * self.max_length]
        if len(head) < len(text):
            num_tokens = len(self._encode(head))
            if num_tokens > 2 * self.max_length and not request.truncate:
                raise InputTooLongError(num_tokens, self.max_length, at_least=True)
            text = head if num_tokens > 2 * self.max_length else text
        ids = self._encode(text)
        return self._cut(text) if request.truncate and len(ids) > self.max_length else ids

    def _encode(self, text: str) -> TokenArray:
        try:
            return self.encode_text(text)
        except InputError as error:
            error.param = "input"
            raise

    def _cut(self, text: str) -> TokenArray:
        """The first tokens, with the special ones around them, max_length in all."""
        if self._backend is None:
            return np.asarray(self._hf.encode(text, truncation=True, max_length=self.max_length), dtype=np.int64)
        encoding: Any = self._backend.encode(text, add_special_tokens=False)
        num_special = self._backend.num_special_tokens_to_add(False)
        encoding.truncate(max(0, self.max_length - num_special))
        return np.asarray(self._backend.post_process(encoding).ids, dtype=np.int64)

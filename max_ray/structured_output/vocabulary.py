"""The tokens of a model as the grammar library takes them: bytes a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llguidance import LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

from max_ray.errors import ConfigError

_MARKER = 0xFF  # the library's mark of special tokens; no byte of UTF-8


@dataclass(frozen=True)
class TokenVocabulary:
    """What each token id adds to a text.

    Args:
        tokens: By id; as many as the model has logits. Empty for an id that is never text: those of special tokens,
            and those without a token.
        eos_token_id: A token that ends a text; the grammar allows it where the text may end.
        encode: Token ids of a text, without tokens around it.

    Raises:
        ConfigError: The model names no token that ends a text.
    """

    tokens: Sequence[bytes]
    eos_token_id: int | None
    encode: Callable[[str], list[int]]

    def __post_init__(self) -> None:
        if self.eos_token_id is None or not 0 <= self.eos_token_id < len(self.tokens):
            raise ConfigError("Structured output needs a token that ends a text, and this model names none.")

    def build(self) -> LLTokenizer:
        """The library's tokenizer: up to a second for a large vocabulary, most of it holding the interpreter."""
        return LLTokenizer(TokenizerWrapper(_TokenizerLike(self)))


class _TokenizerLike:
    """The attributes that the library reads of a tokenizer."""

    bos_token_id = None

    def __init__(self, vocabulary: TokenVocabulary) -> None:
        eos = vocabulary.eos_token_id
        assert eos is not None
        self.tokens = [b"" if _MARKER in token else token for token in vocabulary.tokens]
        self.tokens[eos] = b"<|end of text|>"
        self.eos_token_id = eos
        self.special_token_ids = [eos]
        self._encode = vocabulary.encode

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("texts only")  # tells the library so: it asks with b"test" once
        return self._encode(text)

"""Logit controls that a request gives as texts, and the token ids that they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from max_ray.errors import InputError
from max_ray.tokenization.token_bytes import token_text_of

if TYPE_CHECKING:
    from max_ray.tokenization.tokenizer import TextTokenizer

DEFAULT_BREAKERS = ("\n", ":", '"', "*")
"""Of DRY, where the request names none; those of llama.cpp."""
MANY_WORDS = 32
"""More bad words are looked up in a thread."""
_MAX_TAIL = 20  # tokens of a breaker behind its first one, as in llama.cpp

Ids = tuple[int, ...]


class LogitTexts:
    """Looks texts up in one tokenizer, and remembers them for the other choices of the request.

    Args:
        tokenizer: Of the model.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._bad_words = lru_cache(maxsize=64)(self._find_bad_words)
        self._breakers = lru_cache(maxsize=256)(self._find_breakers)

    def resolved(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Sampling parameters in which ids stand for texts.

        Args:
            given: Sampling parameters by our names, as a request gives them.

        Raises:
            InputError: A text has no tokens.
        """
        found: dict[str, Any] = {}
        if given.get("logit_bias"):
            found["logit_bias"] = tuple(self._bias(given["logit_bias"]))
        if given.get("allowed_token_ids") is not None:
            found["allowed_token_ids"] = tuple(given["allowed_token_ids"])
        if given.get("bad_words"):
            found["bad_words"] = self._bad_words(tuple(given["bad_words"]))
        if given.get("dry_multiplier"):
            names = given.get("dry_sequence_breakers")
            names = DEFAULT_BREAKERS if names is None else names
            found["dry_breakers"] = tuple(dict.fromkeys(ids for name in names for ids in self._breakers(name)))
        if (given.get("repeat_last_n") or 0) >= self._tokenizer.max_length:
            found["repeat_last_n"] = -1  # the whole text
        if not found and not given.keys() & _TEXT_NAMES:
            return given
        return {name: value for name, value in given.items() if name not in _TEXT_NAMES} | found

    def _bias(self, pairs: Iterable[tuple[int | str, float]]) -> Iterable[tuple[int, float]]:
        """Each token once; a text stands for each of its tokens, and the last value counts."""
        values: dict[int, float] = {}
        for key, value in pairs:
            for token in (key,) if isinstance(key, int) else self._ids(key, "logit_bias"):
                values[token] = value
        return values.items()

    def _find_bad_words(self, words: tuple[str, ...]) -> tuple[Ids, ...]:
        """The words at the beginning of a text, and behind a space."""
        found: dict[Ids, None] = {}
        for word in words:
            plain = self._ids(word.lstrip(" ") or word, "bad_words")
            spaced = self._ids(f" {word.lstrip(' ')}", "bad_words")
            if spaced[-len(plain) :] == plain:  # a token for the space, and the same ones
                spaced = plain
            found[plain] = found[spaced] = None
        return tuple(found)

    def _find_breakers(self, text: str) -> tuple[Ids, ...]:
        """The token sequences that contain a text: tokens with all of it, and tokens that end with its beginning,
        together with the tokens of the rest."""
        bytes_of, size = token_text_of(self._tokenizer).bytes_of, self._tokenizer.vocab_size
        wanted = text.encode("utf-8", "surrogatepass")
        rests = {text[:cut].encode("utf-8", "surrogatepass"): text[cut:] for cut in range(1, len(text))}
        tails = {head: self._rest_ids(rest) for head, rest in rests.items()}
        found: dict[Ids, None] = {}
        for token in range(size):
            piece = bytes_of(token)
            if wanted in piece:
                found[(token,)] = None
            elif tails:
                found |= dict.fromkeys((token, *tail) for head, tail in tails.items() if tail and piece.endswith(head))
        return tuple(found)

    def _rest_ids(self, text: str) -> Ids:
        return tuple(self._tokenizer.encode_text(text, add_special_tokens=False).tolist()[:_MAX_TAIL])

    def _ids(self, text: str, param: str) -> Ids:
        try:
            ids = tuple(self._tokenizer.encode_text(text, add_special_tokens=False).tolist())
        except InputError as error:
            error.param = param
            raise
        if not ids:
            raise InputError(f"The text {text[:64]!r} in {param} has no tokens.", param=param)
        return ids


_TEXT_NAMES = {"logit_bias", "bad_words", "allowed_token_ids", "dry_sequence_breakers"}


def is_long(given: object) -> bool:
    """Whether sampling parameters take long to look up: DRY reads the whole vocabulary once."""
    if not isinstance(given, Mapping):
        return False
    words: Sequence[str] = given.get("bad_words") or ()
    return bool(given.get("dry_multiplier")) or len(words) > MANY_WORDS

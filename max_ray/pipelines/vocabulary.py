"""The vocabulary of structured output, made from a model's tokenizer."""

from __future__ import annotations

from max_ray.errors import ConfigError
from max_ray.structured_output import TokenVocabulary
from max_ray.tokenization.token_bytes import TokenText
from max_ray.tokenization.tokenizer import TextTokenizer

_NUM_PROBES = 256


def token_vocabulary(tokenizer: TextTokenizer, vocab_size: int) -> TokenVocabulary:
    """The bytes of each token.

    Args:
        tokenizer: The model's.
        vocab_size: Logits that the model gives; ids past the tokenizer's are never text.

    Raises:
        ConfigError: The text of several tokens is not that of each one put together, or no token ends a text.
    """
    texts = TokenText(tokenizer)
    hidden = tokenizer.special_ids | tokenizer.eos_token_ids
    tokens = [b"" if i in hidden else texts.bytes_of(i) for i in range(vocab_size)]
    _check_gluing(tokenizer, tokens)
    eos = next((i for i in sorted(tokenizer.eos_token_ids) if i < vocab_size), None)
    return TokenVocabulary(tokens, eos, lambda text: tokenizer.encode_text(text, False).tolist())


def _check_gluing(tokenizer: TextTokenizer, tokens: list[bytes]) -> None:
    """Puts some tokens behind a plain one and compares the text with their bytes."""
    before = next((i for i, token in enumerate(tokens) if token.isalpha() and token.isascii()), None)
    if before is None:
        raise ConfigError("Structured output needs a tokenizer with plain letters.")
    start = tokens[before].decode()
    for i in range(0, len(tokens), max(1, len(tokens) // _NUM_PROBES)):
        if not tokens[i] or i in tokenizer.added_ids:
            continue
        text = tokenizer.decode_ids([before, before, i], True)
        if _is_text(tokens[i]) and not text.endswith(start + tokens[i].decode()):
            raise ConfigError(
                f"Structured output cannot be had with this tokenizer: the token {i} stands for {tokens[i]!r}, and is "
                f"written as {text!r} behind {start!r}."
            )


def _is_text(token: bytes) -> bool:
    try:
        return bool(token.decode())
    except UnicodeDecodeError:
        return False

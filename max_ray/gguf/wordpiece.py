"""BERT's WordPiece from a GGUF file (tokenizer.ggml.model "bert").

The file has the pieces in llama.cpp's spelling: a piece that begins a word has U+2581 before it, one that goes on has
nothing, where tokenizer.json has nothing and `##`. Control tokens are as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

_BEGIN, _CONTINUES = "\u2581", "##"
_MAX_WORD = 100  # characters; a longer word is unknown
_LOWERCASE, _STRIP = "tokenizer.ggml.normalizer.lowercase", "tokenizer.ggml.normalizer.strip_accents"


def pieces_of(tokens: Sequence[str], kinds: Sequence[int], control: int) -> list[str]:
    """The tokens in the spelling of tokenizer.json. kinds: of the tokens; control: the kind of control tokens."""
    return [
        token if kind == control else token[1:] if token.startswith(_BEGIN) else _CONTINUES + token
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def build_wordpiece(keys: Mapping[str, Any], pieces: Sequence[str], unknown: str, special: set[str]) -> Tokenizer:
    """The tokenizer without added tokens. keys: of the file; unknown: the token for words that no pieces make.

    Most files do not say whether text is put into lower case. It is where no piece has a capital letter: no such text
    was in the training.
    """
    lower = keys.get(_LOWERCASE)
    if lower is None:
        lower = all(piece == piece.lower() for piece in pieces if piece not in special)
    tokenizer = Tokenizer(
        models.WordPiece(
            vocab={piece: i for i, piece in enumerate(pieces)},
            unk_token=unknown,
            max_input_chars_per_word=_MAX_WORD,
            continuing_subword_prefix=_CONTINUES,
        )
    )
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=bool(lower), strip_accents=bool(keys.get(_STRIP, lower))
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUES)
    return tokenizer

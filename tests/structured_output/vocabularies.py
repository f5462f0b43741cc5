"""Vocabularies of tiny tokenizers: a token a byte, several bytes a token, byte-level BPE, SentencePiece with bytes."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from max_ray.structured_output import TokenVocabulary

TEXTS = [
    '{"name": "Ann", "age": 31, "tags": ["a", "b"], "is_ok": true, "note": null}',
    '{"kind": "point", "x": 1.5, "y": -2, "label": "nord"}',
    "The quick brown fox jumps over the lazy dog. Das ist ein Beispiel: größer, schöner, 日本.",
] * 3


def trained_bpe(folder: Path, vocab_size: int = 420) -> Path:
    """A byte-level BPE tokenizer.json, trained on a few lines of JSON and of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def merged_bytes(seed: int = 0, num_merged: int = 300) -> TokenVocabulary:
    """All bytes, pieces of JSON texts of 2 to 6 bytes, and the end token last."""
    rng = random.Random(seed)
    source = "".join(TEXTS).encode()
    starts = [rng.randrange(len(source) - 6) for _ in range(num_merged)]
    pieces = {source[start : start + rng.randint(2, 6)] for start in starts}
    tokens = [bytes([i]) for i in range(256)] + sorted(pieces) + [b"", b""]
    return TokenVocabulary(tokens, len(tokens) - 1, lambda text: list(text.encode()))

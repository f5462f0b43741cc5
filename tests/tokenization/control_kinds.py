"""Tiny tokenizers of four kinds, with special tokens, other added tokens and a chat template."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>")
BARRED = "<|system|>"
"""Added, not special, and no tag."""
TAGS = ("<think>", "</think>")
WORD = "Qwen"
NAMES = (*SPECIAL, BARRED)


def _byte_level(normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|", "|>", "im", "im_", "\u0120a", "\u010a\u010a", "user"]
    merges = [("<", "|"), ("|", ">"), ("i", "m"), ("im", "_"), ("\u0120", "a"), ("\u010a", "\u010a")]
    vocab = {piece: number for number, piece in enumerate([*SPECIAL, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_fallback() -> Tokenizer:
    pieces = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *"<>|_/imsaend", "\u2581a", "im", "\u2581<"]
    merges = [("\u2581", "a"), ("i", "m"), ("\u2581", "<")]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _unigram() -> Tokenizer:
    """The names are pieces of the vocabulary, as sentencepiece's are: a plain text may become one of them."""
    pieces = [(name, 0.0) for name in SPECIAL]
    pieces += [(f"<0x{b:02X}>", -20.0) for b in range(256)]
    pieces += [("\u2581", -3.0), ("\u2581a", -2.0), ("im", -2.0), *((chr(c), -5.0) for c in range(0x21, 0x7F))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


KINDS = ("byte-level", "byte-fallback", "unigram", "nfkc")


def write(folder: Path, kind: str, template: str) -> Path:
    """A model folder. The names of the kind "nfkc" are found in normalized text."""
    folder.mkdir(parents=True, exist_ok=True)
    makers = {"byte-fallback": _byte_fallback, "unigram": _unigram}
    nfkc = normalizers.NFKC() if kind == "nfkc" else None
    tokenizer = makers[kind]() if kind in makers else _byte_level(nfkc)
    is_normalized = kind == "nfkc"
    tokenizer.add_special_tokens([AddedToken(name, normalized=is_normalized, special=True) for name in SPECIAL])
    others = [BARRED, *TAGS, WORD]
    tokenizer.add_tokens([AddedToken(name, normalized=is_normalized, special=False) for name in others])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"pad_token": "<pad>", "chat_template": template, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size, "eos_token_id": 2}))
    return folder

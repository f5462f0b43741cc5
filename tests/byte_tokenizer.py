"""Tiny tokenizer folders made on the fly, without torch: one token a byte, so that any text and any byte is possible.

`write_byte_level`: the GPT-2 kind (ByteLevel). `write_byte_fallback`: the SentencePiece kind (Metaspace, <0x00>...).
Ids 0-4 of both: <pad> <s> </s> <|user|> <|assistant|>; then the 256 bytes, at BYTE_OFFSET plus what `byte_ids` says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")
BOS_ID, EOS_ID = 1, 2
BYTE_OFFSET = len(SPECIAL_TOKENS)
VOCAB_SIZE = BYTE_OFFSET + 256
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] in ['developer', 'critic'] %}"
    "{{ raise_exception('Only system, user and assistant are known.') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{% if message['name'] %}@{{ message['name'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_byte_level(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, **generation_config: Any) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab=_vocab(alphabet), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _write(folder, tokenizer, chat_template, generation_config)


def write_byte_fallback(folder: Path, *, words: tuple[str, ...] = ("\u2581", "a", "b", "\u2581a", "ab")) -> Path:
    """As Llama 2's: a few pieces with the space mark, everything else as bytes."""
    vocab = _vocab([f"<0x{b:02X}>" for b in range(256)])
    vocab |= {word: len(vocab) + i for i, word in enumerate(words)}
    merges = [(w[:-1], w[-1]) for w in words if len(w) == 2]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<pad>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return _write(folder, tokenizer, CHAT_TEMPLATE, {}, vocab_size=len(vocab))


def _vocab(pieces: list[str]) -> dict[str, int]:
    return {piece: i for i, piece in enumerate([*SPECIAL_TOKENS, *pieces])}


def _write(
    folder: Path,
    tokenizer: Tokenizer,
    chat_template: str | None,
    generation_config: dict[str, Any],
    vocab_size: int = VOCAB_SIZE,
) -> Path:
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS_ID)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"pad_token": "<pad>", "chat_template": chat_template} if chat_template else {"pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size, "eos_token_id": EOS_ID}))
    if generation_config:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return folder

"""Small tokenizers of every kind of decoder, and what their texts and offsets are, worked out the slow way."""

from __future__ import annotations

import codecs
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import BOS_ID, CHAT_TEMPLATE, EOS_ID, SPECIAL_TOKENS, write_byte_fallback, write_byte_level

MARK = "\u2581"
SPECIAL_IDS = range(len(SPECIAL_TOKENS))


def write_byte_sequence(folder: Path) -> Path:
    """The byte-level kind behind a sequence of decoders, which could do anything."""
    path = write_byte_level(folder) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    tokenizer.save(str(path))
    return folder


def write_metaspace(folder: Path) -> Path:
    """As T5's: words with a space mark; the first one's space is dropped."""
    vocab = _vocab(["<unk>", MARK, "a", "b", f"{MARK}a", f"{MARK}b", "ab", "\u00e9"])
    merges = [(MARK, "a"), (MARK, "b"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _write(folder, tokenizer, len(vocab))


def write_word_piece(folder: Path) -> Path:
    """As BERT's: words stand apart, and their later pieces begin with ##."""
    vocab = _vocab(["<unk>", "a", "b", "##a", "##b", "ab", ".", "\u00e9"])
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return _write(folder, tokenizer, len(vocab))


def write_word_ends(folder: Path) -> Path:
    """As the first GPT's: the last piece of a word ends with a mark."""
    vocab = _vocab(["<unk>", "a", "b", "a</w>", "b</w>", "ab</w>"])
    merges = [("a", "b</w>")]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder()
    return _write(folder, tokenizer, len(vocab))


def _vocab(pieces: list[str]) -> dict[str, int]:
    return {piece: i for i, piece in enumerate([*SPECIAL_TOKENS, *pieces])}


def _write(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> Path:
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS_ID)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"pad_token": "<pad>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size, "eos_token_id": EOS_ID}))
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "byte_level": write_byte_level,
    "byte_sequence": write_byte_sequence,
    "byte_fallback": write_byte_fallback,
    "metaspace": write_metaspace,
    "word_piece": write_word_piece,
    "word_ends": write_word_ends,
}


@dataclass(frozen=True)
class Kind:
    """One tokenizer and its reference texts."""

    name: str
    tokenizer: TextTokenizer

    @classmethod
    def make(cls, name: str, folder: Path) -> Kind:
        return cls(name, TextTokenizer(WRITERS[name](folder / name), max_length=200))

    def ids(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer.encode_text(text, add_special_tokens=False)]

    def random_ids(self, generator: random.Random, length: int) -> list[int]:
        """Any ids: whole characters, broken ones, and special tokens in between."""
        ids: list[int] = []
        while len(ids) < length:
            text = generator.choice(["a", " b", "ab", "\u00e9", "\u4f60", "\U0001f600", " "])
            choices = [self.ids(text), [generator.choice(SPECIAL_IDS)]]
            ids += generator.choice([*choices, [generator.randrange(self.tokenizer.vocab_size)]])
        return ids[:length]

    def text(self, ids: list[int]) -> str:
        """All at once. Broken bytes of a fallback run do not take whole characters before them back."""
        if self.name != "byte_fallback":
            return self.tokenizer.decode_ids(ids, True)
        pieces = [self.tokenizer.token_piece(i).replace(MARK, " ") for i in ids if i not in SPECIAL_IDS]
        text = re.sub(r"(<0x..>)+", lambda run: _run_text(_run_bytes(run[0])), "".join(pieces))
        return text.removeprefix(" ")

    def settled(self, ids: list[int]) -> str:
        """The text without an incomplete character at its end."""
        text = self.text(ids)
        return text.removesuffix("\ufffd" * self.num_pending(ids)) if self.num_pending(ids) else text

    def num_pending(self, ids: list[int]) -> int:
        """Replacement characters at the end that are no characters yet."""
        if self.name == "byte_level":
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            decoder.decode(self._bytes(ids))
            return int(bool(decoder.getstate()[0]))
        text = self.text(ids)
        return len(text) - len(text.rstrip("\ufffd"))

    def offsets(self, ids: list[int]) -> list[int]:
        """Of each token: characters before the one in which its text begins."""
        return [self._offset(ids, position) for position in range(len(ids))]

    def _offset(self, ids: list[int], position: int) -> int:
        before, token = ids[:position], ids[position]
        if token in SPECIAL_IDS or not self.tokenizer.token_piece(token):
            return self._place_of_nothing(ids, position)
        if self.name == "byte_level":
            first_byte = self._bytes([token])[:1]
            return len((self._bytes(before) + first_byte).decode(errors="replace")) - 1
        if self.name == "byte_fallback" and self.tokenizer.token_piece(token).startswith("<0x"):
            return self._place_in_run(ids, position)
        return len(self.text(before))

    def _place_of_nothing(self, ids: list[int], position: int) -> int:
        """A special token stands where the next visible one begins to count, inside an open character before it."""
        if self.name == "byte_level":
            return len(self.settled(ids[:position]))
        later = [i for i in ids[position:] if i not in SPECIAL_IDS]
        rest = [i for i in ids[:position] if i not in SPECIAL_IDS]
        return self._offset(rest + later, len(rest)) if later else len(self.text(rest))

    def _place_in_run(self, ids: list[int], position: int) -> int:
        """The run's whole characters are shared by their bytes; of the broken rest every byte is a character."""
        visible = [i for i in ids if i not in SPECIAL_IDS]
        place = sum(i not in SPECIAL_IDS for i in ids[:position])
        is_byte = [self.tokenizer.token_piece(i).startswith("<0x") for i in visible]
        start = place
        while start and is_byte[start - 1]:
            start -= 1
        end = place
        while end < len(visible) and is_byte[end]:
            end += 1
        content = _run_bytes("".join(self.tokenizer.token_piece(i) for i in visible[start:end]))
        spans = [i for i, c in enumerate(_run_text(content)) for _ in range(len(c.encode()) if c != "\ufffd" else 1)]
        return len(self.text(visible[:start])) + spans[place - start]

    def _bytes(self, ids: list[int]) -> bytes:
        return b"".join(_alphabet_bytes(self.tokenizer.token_piece(i)) for i in ids if i not in SPECIAL_IDS)


@cache
def _alphabet_bytes(piece: str) -> bytes:
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return bytes(ord(c) if ord(c) < 256 else others[ord(c) - 256] for c in piece)


def _run_bytes(run: str) -> bytes:
    return bytes(int(b, 16) for b in re.findall(r"<0x(..)>", run))


def _run_text(content: bytes) -> str:
    """The longest beginning that is whole characters, and a replacement character for each byte behind it."""
    for length in range(len(content), -1, -1):
        try:
            return content[:length].decode() + "\ufffd" * (len(content) - length)
        except UnicodeDecodeError:
            continue
    raise AssertionError("no bytes are always text")

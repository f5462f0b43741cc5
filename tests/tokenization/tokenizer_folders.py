"""Tokenizer folders of every kind, and the tokenizer that each must give.

A kind is made whole first: a `tokenizers.Tokenizer` with all its tokens and what it puts around a text. That is what
tokenizes. The folder is made from it: tokenizer.json, from which a kind may take tokens that then only another file
names, and a tokenizer_config.json with a class that has other rules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.tokenization.texts import CORPUS

SPACE = "\u2581"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_WORDS = LLAMA3_WORDS.replace("{1,3}", "")
_HEAD, _TAIL = r"[^\r\n\p{L}\p{N}]?", r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_WORDS = f"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*{_TAIL}"
DEEPSEEK_CUTS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
CONTROLS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Kind:
    """make: the whole tokenizer. hidden: tokens that tokenizer.json leaves out (they are the last ones in the ids).

    bare: tokenizer.json puts nothing around a text. config: of tokenizer_config.json, beside the names of tokens.
    model_type: of config.json. files: further files, by name.
    """

    make: Callable[[], Tokenizer]
    model_type: str = "llama"
    hidden: tuple[str, ...] = ()
    bare: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Tokenizer:
        """Writes the folder and gives what must tokenize."""
        whole = self.make()
        stored = json.loads(whole.to_str())
        stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] not in self.hidden]
        stored["post_processor"] = None if self.bare else stored["post_processor"]
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            "tokenizer.json": stored,
            "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", **self.config},
            "config.json": {"model_type": self.model_type, "vocab_size": 4096},
            **self.files,
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        return whole


def byte_level(
    *cuts: str,
    nfc: bool = False,
    begin: bool = False,
    end: bool = False,
    whole_words: bool = False,
    extra: tuple[str, ...] = CONTROLS[2:],
) -> Tokenizer:
    """Byte-level BPE; its words are cut by these patterns one after another, by GPT-2's where there are none."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in cuts]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cuts)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=list(CONTROLS[:2]), initial_alphabet=alphabet, show_progress=False
        ),
    )
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer.model = models.BPE(vocab=model["vocab"], merges=merges, ignore_merges=whole_words)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(extra))
    return _with_ends(tokenizer, begin, end)


def sentencepiece(*, prefix: str = "normalizer", spaces: bool = True, begin: bool = True) -> Tokenizer:
    """As Llama 2 and Gemma have it. prefix: what puts a space before a text: `normalizer`, `metaspace` or `none`."""
    vocabulary, merges = scored_pieces()
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tail: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    if prefix == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        first = [normalizers.Prepend(SPACE)] if prefix == "normalizer" else []
        tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    if prefix != "none":
        tail.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), *tail])
    tokenizer.add_special_tokens(["<unk>", *CONTROLS])
    if spaces:
        tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    return _with_ends(tokenizer, begin, False)


def scored_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A SentencePiece vocabulary: special tokens, bytes, pieces from the best score to the worst; and its merges."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(CORPUS[:3], trainers.BpeTrainer(vocab_size=220, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    longer = dict.fromkeys("".join(merge) for merge in model["merges"])
    letters = sorted({letter for piece in model["vocab"] for letter in piece})
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *longer, *letters]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = [
        (vocabulary[piece], vocabulary[piece[:cut]], vocabulary[piece[cut:]], piece[:cut], piece[cut:])
        for piece in longer
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return vocabulary, [(left, right) for *_, left, right in sorted(merges)]


def unigram() -> Tokenizer:
    vocabulary, _ = scored_pieces()
    pieces = [(piece, -float(len(vocabulary) - i) / 10) for i, piece in enumerate(vocabulary) if "0x" not in piece]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(list(CONTROLS))
    return _with_ends(tokenizer, True, True)


def word_piece() -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", "the", "hello", "##s", "##e", *(chr(c) for c in range(33, 127))]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"##{chr(c)}" for c in range(97, 115) if chr(c) != "e")])}
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(CONTROLS))
    return _with_ends(tokenizer, True, True)


def _with_ends(tokenizer: Tokenizer, begin: bool, end: bool) -> Tokenizer:
    template = [*(["<s>"] if begin else []), "$A", *(["</s>"] if end else [])]
    if len(template) > 1:
        ids = [(name, tokenizer.token_to_id(name)) for name in template if name != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


def numbered(*names: str) -> dict[str, Any]:
    """added_tokens_decoder for the last tokens of `byte_level`."""
    whole = byte_level(extra=names)
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {str(whole.token_to_id(name)): {"content": name, **flags} for name in names}


def named(class_name: str, **config: Any) -> dict[str, Any]:
    return {"tokenizer_class": class_name, **config}


_CHATML = CONTROLS[2:]
KINDS: dict[str, Kind] = {
    "prepend and replace": Kind(sentencepiece, config=named("LlamaTokenizer", add_prefix_space=False)),
    "replace alone": Kind(lambda: sentencepiece(prefix="none"), "gemma2", config=named("LlamaTokenizerFast")),
    "metaspace": Kind(lambda: sentencepiece(prefix="metaspace"), config=named("LlamaTokenizerFast", legacy=True)),
    "byte fallback under a byte-level class": Kind(
        lambda: sentencepiece(spaces=False), "qwen2", config=named("Qwen2Tokenizer")
    ),
    "digits in threes": Kind(
        lambda: byte_level(LLAMA3_WORDS, begin=True, whole_words=True), "qwen2", config=named("Qwen2Tokenizer")
    ),
    "digits one by one": Kind(lambda: byte_level(QWEN_WORDS, nfc=True), "gpt2", config=named("GPT2Tokenizer")),
    "no NFC": Kind(lambda: byte_level(QWEN_WORDS), "qwen3", config=named("Qwen2TokenizerFast")),
    "words of GPT-2": Kind(byte_level, "llama", config=named("LlamaTokenizer")),
    "words of Tekken": Kind(
        lambda: byte_level(TEKKEN_WORDS, begin=True, whole_words=True), "qwen2", config=named("GPT2Tokenizer")
    ),
    "tokens in tokenizer_config.json": Kind(
        lambda: byte_level(QWEN_WORDS, nfc=True),
        "qwen2",
        hidden=_CHATML,
        config=named("Qwen2Tokenizer", added_tokens_decoder=numbered(*_CHATML)),
    ),
    "tokens behind free ids": Kind(
        lambda: byte_level(extra=("<|reserved_token_420|>", "<|reserved_token_421|>", "<|im_end|>")),
        hidden=("<|reserved_token_420|>", "<|reserved_token_421|>", "<|im_end|>"),
        config=named("GPT2Tokenizer", added_tokens_decoder={"422": {"content": "<|im_end|>", "special": True}}),
    ),
    "tokens in added_tokens.json": Kind(
        lambda: byte_level(QWEN_WORDS, nfc=True),
        "qwen2",
        hidden=_CHATML,
        config=named("Qwen2Tokenizer"),
        files={
            "added_tokens.json": {"<|im_start|>": 420, "<|im_end|>": 421},
            "special_tokens_map.json": {
                "additional_special_tokens": ["<|im_start|>"],
                "eos_token": {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False},
            },
        },
    ),
    "tokens in special_tokens_map.json": Kind(
        byte_level,
        hidden=_CHATML,
        config=named("PreTrainedTokenizerFast"),
        files={"special_tokens_map.json": {"additional_special_tokens": list(_CHATML), "eos_token": "</s>"}},
    ),
    "BOS by flag": Kind(
        lambda: byte_level(*DEEPSEEK_CUTS, begin=True),
        "deepseek_v3",
        bare=True,
        config=named("LlamaTokenizerFast", add_bos_token=True, add_eos_token=False),
    ),
    "both ends by flag": Kind(
        lambda: byte_level(begin=True, end=True),
        bare=True,
        config=named("PreTrainedTokenizerFast", add_bos_token=True, add_eos_token=True),
    ),
    "flags that take nothing away": Kind(
        lambda: byte_level(begin=True),
        config=named("LlamaTokenizerFast", add_bos_token=False, add_eos_token=False),
    ),
    "unigram": Kind(unigram, "xlm-roberta", config=named("XLMRobertaTokenizer")),
    "word pieces in both cases": Kind(word_piece, "bert", config=named("BertTokenizer", do_lower_case=True)),
}

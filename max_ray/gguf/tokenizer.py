"""The tokenizer that a GGUF file holds, as an object of the `tokenizers` library.

| tokenizer.ggml.model | kind                                                                                      |
|----------------------|-------------------------------------------------------------------------------------------|
| gpt2                 | byte-level BPE with merges; tokenizer.ggml.pre names the rule that cuts text into words     |
| llama                | SentencePiece BPE: pieces with scores; merges follow from the scores; bytes as <0x0A>       |
| bert                 | WordPiece                                                                                   |
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from max_ray.errors import WeightsError
from max_ray.gguf.file import GgufFile
from max_ray.gguf.strings import StringArray
from max_ray.gguf.wordpiece import build_wordpiece, pieces_of
from max_ray.gguf.words import NFC_RULES, WHOLE_WORD_RULES, WORD_RULES
from max_ray.log import get_logger

_logger = get_logger(__name__)
_CONTROL, _USER_DEFINED, _UNKNOWN = 3, 4, 2
_ROLES = (
    *(("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")),
    *(("cls", "cls"), ("sep", "seperator"), ("mask", "mask")),
)
"""Of a special token, and what the format calls it in its keys."""
_SPACE = "\u2581"  # SentencePiece's sign for a space


@dataclass(frozen=True)
class GgufTokenizer:
    """tokenizer: encodes and decodes; adds the beginning-of-text token where the model wants one.

    names: special token by role (bos_token, eos_token, unk_token, pad_token); chat_template: Jinja text, several by
    name, or None.
    """

    tokenizer: Tokenizer
    names: dict[str, str]
    control_tokens: tuple[str, ...]
    chat_template: str | dict[str, str] | None


def build_tokenizer(file: GgufFile) -> GgufTokenizer:
    """The tokenizer of a model. Raises WeightsError where the file has none, or one of a kind that is not read."""
    with _collector_paused():
        return _build(file)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """A hundred thousand pairs of strings make the garbage collector search all objects of the process, several times;
    with torch imported that takes longer than the rest."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _build(file: GgufFile) -> GgufTokenizer:
    keys = file.metadata
    tokens, kinds = _tokens(file)
    kind = keys.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(file, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(file, tokens, kinds)
    elif kind == "bert":
        tokens = pieces_of(tokens, kinds, _CONTROL)
        tokenizer = _wordpiece(file, tokens, kinds)
    else:
        raise WeightsError(f"{file.path}: a tokenizer of the kind {kind!r} cannot be read; gpt2, llama and bert can.")
    added = [(tokens[i], of) for i, of in enumerate(kinds) if of in (_CONTROL, _UNKNOWN, _USER_DEFINED)]
    control = [token for token, of in added if of != _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    extra = [token for token, of in added if of == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in extra])
    names = _special_names(file, tokens)
    _add_ends(file, tokenizer, tokens, names)
    return GgufTokenizer(tokenizer, names, tuple(control), _chat_template(file))


def _chat_template(file: GgufFile) -> str | dict[str, str] | None:
    key = "tokenizer.chat_template"
    named = {name.removeprefix(f"{key}."): text for name, text in file.metadata.items() if name.startswith(f"{key}.")}
    own = file.metadata.get(key)
    templates = {name: text for name, text in {**named, "default": own}.items() if isinstance(text, str)}
    return templates.get("default") if templates.keys() <= {"default"} else templates


def _tokens(file: GgufFile) -> tuple[list[str], list[int]]:
    tokens = _strings(file, "tokenizer.ggml.tokens")
    kinds = file.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens or [])
    if not tokens:
        raise WeightsError(f"{file.path} holds no tokenizer: tokenizer.ggml.tokens is missing or no list of texts.")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise WeightsError(f"{file.path}: tokenizer.ggml.token_type must have {len(tokens)} entries.")
    return tokens, kinds


def _strings(file: GgufFile, key: str) -> list[str]:
    """An array of strings; empty where the key is missing or something else. Raises WeightsError for other bytes than
    UTF-8."""
    strings = file.metadata.get(key)
    if isinstance(strings, list):
        return strings if all(isinstance(text, str) for text in strings) else []
    if not isinstance(strings, StringArray):
        return []
    try:
        return strings.texts()
    except UnicodeDecodeError:
        raise WeightsError(f"{file.path} is truncated or corrupt: {key} has text that is not UTF-8.") from None


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    rule = file.metadata.get("tokenizer.ggml.pre")
    if rule is None:
        _logger.warning("%s does not say how text is cut into words (tokenizer.ggml.pre): GPT-2's rule.", file.path)
        rule = "default"
    if rule not in WORD_RULES:
        raise WeightsError(
            f"{file.path}: the word rule {rule!r} (tokenizer.ggml.pre) is not known; known are "
            f"{', '.join(sorted(WORD_RULES))}."
        )
    vocabulary = dict(zip(tokens, range(len(tokens)), strict=True))
    tokenizer = Tokenizer(_byte_pairs(file, vocabulary, ignore_merges=rule in WHOLE_WORD_RULES))
    patterns = WORD_RULES[rule]
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns if pattern is not None]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=None in patterns)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, level])
    if rule in NFC_RULES:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_pairs(file: GgufFile, vocabulary: dict[str, int], *, ignore_merges: bool) -> models.BPE:
    """The model of the file's merges. Raises WeightsError for one that does not make one token of two others."""
    key = "tokenizer.ggml.merges"
    try:
        return models.BPE(vocab=vocabulary, merges=_merges(file, key), ignore_merges=ignore_merges)
    except WeightsError:
        raise
    except Exception as error:  # the library looks each merge up, and raises Exception itself
        wrong = next((text for text in _strings(file, key) if not _is_merge(text, vocabulary)), "")
        raise WeightsError(
            f"{file.path}: {wrong!r} in tokenizer.ggml.merges does not make one token of two others."
        ) from error


def _merges(file: GgufFile, key: str) -> list[tuple[str, str]]:
    """The two tokens of each merge. One with more spaces or none is not cut right, and no token of the vocabulary."""
    stored = file.metadata.get(key)
    try:
        pairs = stored.pairs() if isinstance(stored, StringArray) else None
    except UnicodeDecodeError:
        pairs = None  # said below
    return [text.partition(" ")[::2] for text in _strings(file, key)] if pairs is None else pairs


def _is_merge(text: str, vocabulary: dict[str, int]) -> bool:
    left, _, right = text.partition(" ")
    return {left, right, left + right} <= vocabulary.keys()


def _sentencepiece(file: GgufFile, tokens: list[str], kinds: list[int]) -> Tokenizer:
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise WeightsError(f"{file.path}: tokenizer.ggml.scores must have {len(tokens)} entries.")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    merges = _merges_by_score(vocabulary, scores)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefixed = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    undo = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])
    return tokenizer


def _wordpiece(file: GgufFile, pieces: list[str], kinds: list[int]) -> Tokenizer:
    names = _special_names(file, pieces)
    special = {piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _CONTROL}
    return build_wordpiece(file.metadata, pieces, names.get("unk_token", "[UNK]"), special)


def _merges_by_score(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair with the best-scored result first: that order as a list of merges."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, i in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[i], vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _special_names(file: GgufFile, tokens: list[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for role, key in _ROLES:
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if type(index) is not int or not 0 <= index < len(tokens):
            raise WeightsError(f"{file.path}: tokenizer.ggml.{key}_token_id is {index!r}, and there is no such token.")
        names[f"{role}_token"] = tokens[index]
    return names


def _add_ends(file: GgufFile, tokenizer: Tokenizer, tokens: list[str], names: dict[str, str]) -> None:
    """Makes the tokenizer put beginning- and end-of-text around a text where the file asks for it."""
    is_wordpiece = file.metadata.get("tokenizer.ggml.model") == "bert"
    begins = file.metadata.get("tokenizer.ggml.model") in ("llama", "bert") or (
        file.metadata.get("tokenizer.ggml.pre") in WHOLE_WORD_RULES
    )
    first, last = names.get("bos_token"), names.get("eos_token")
    if is_wordpiece:
        first, last = names.get("cls_token", first), names.get("sep_token", last)
    begin = first if file.metadata.get("tokenizer.ggml.add_bos_token", begins) else None
    ends_default = file.metadata.get("tokenizer.ggml.add_sep_token", True) if is_wordpiece else False
    end = last if file.metadata.get("tokenizer.ggml.add_eos_token", ends_default) else None
    if begin is None and end is None:
        return
    ends = {alias: token for alias, token in (("begin", begin), ("end", end)) if token is not None}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*(["begin"] if begin else []), "$A", *(["end"] if end else [])],
        special_tokens=[{"id": alias, "ids": [tokens.index(t)], "tokens": [t]} for alias, t in ends.items()],
    )

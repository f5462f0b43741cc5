"""Tokenizers given by ranked byte strings and a word pattern: tekken.json (Mistral) and tiktoken.model.

A word that is a token is taken whole; in any other the pair whose union has the lowest rank is joined, again and again.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from max_ray.errors import ModelPathError
from max_ray.gguf.words import WORD_RULES
from max_ray.tokenization.loading.added_tokens import unnamed_token
from max_ray.tokenization.loading.folder import read_json
from max_ray.tokenization.loading.settings import TokenizerSettings
from max_ray.tokenization.loading.text_ends import set_text_ends

TEKKEN_FILE, TIKTOKEN_FILE = "tekken.json", "tiktoken.model"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = (rf"[{kinds}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for kinds in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
_KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tiktoken.model holds no pattern: it stands in the Python class that tokenizer_config.json names in auto_map.
# Class -> pattern, and how many ids for special tokens follow those of the file.
_TIKTOKEN_CLASSES = {
    "tokenization_kimi.TikTokenTokenizer": (_KIMI, 256),  # Kimi K2
    "tokenization_moonshot.TikTokenTokenizer": (_KIMI, 256),  # Moonlight, Kimi VL
}
(TEKKEN_PATTERN,) = (pattern for pattern in WORD_RULES["tekken"] if pattern is not None)
_TEKKEN_SIZE = 130_000  # it has 131,072 tokens; Mistral's older vocabularies have 32,768
# Roles of Tekken's special tokens, which the file gives by their names alone.
_TEKKEN_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
# tekken.json before version 11 may leave its special tokens out: these are then the first ones.
_FIRST_TEKKEN_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, binascii.Error)


def is_tekken(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary is Mistral's Tekken, told by its size and first special tokens."""
    first = [tokenizer.id_to_token(i) for i in range(5)]
    return first == list(_FIRST_TEKKEN_TOKENS[:5]) and tokenizer.get_vocab_size() >= _TEKKEN_SIZE


def tekken_pattern(folder: Path) -> str | None:
    """The word pattern of tekken.json; None without that file. Raises ModelPathError."""
    if not (folder / TEKKEN_FILE).is_file():
        return None
    config = read_json(folder / TEKKEN_FILE).get("config")
    pattern = config.get("pattern") if isinstance(config, dict) else None
    if not isinstance(pattern, str):
        raise _damaged(folder / TEKKEN_FILE, "it has no config.pattern")
    return pattern


def read_tekken(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of tekken.json, and its special tokens by role. Raises ModelPathError."""
    path = folder / TEKKEN_FILE
    content = read_json(path)
    try:
        config = content["config"]
        num_special = int(config["default_num_special_tokens"])
        num_ranks = int(config["default_vocab_size"]) - num_special
        given = content.get("special_tokens") or [{"token_str": token} for token in _FIRST_TEKKEN_TOKENS]
        special = {int(token.get("rank", place)): str(token["token_str"]) for place, token in enumerate(given)}
        ranked = {base64.b64decode(token["token_bytes"]): int(token["rank"]) for token in content["vocab"][:num_ranks]}
    except _MALFORMED as error:
        raise _damaged(path, f"{type(error).__name__} {error}") from error
    names = [special.get(i, f"<SPECIAL_{i}>") for i in range(num_special)]
    if _TEKKEN_NAMES["bos_token"] not in names:
        raise _damaged(path, "it has no token for the beginning of a text")
    tokenizer = _tokenizer(ranked, names, word_split(tekken_pattern(folder) or ""), path)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    set_text_ends(tokenizer, [[names.index(_TEKKEN_NAMES["bos_token"])]], [])
    return tokenizer, {role: name for role, name in _TEKKEN_NAMES.items() if name in names}


def read_tiktoken(folder: Path, settings: TokenizerSettings) -> Tokenizer:
    """The tokenizer of tiktoken.model, with the added tokens that follow it in the ids.

    Raises ModelPathError for a file that is damaged, or whose word pattern is not known here.
    """
    path = folder / TIKTOKEN_FILE
    own = _class_of(settings.config)
    if own not in _TIKTOKEN_CLASSES:
        raise ModelPathError(
            f"{path} holds no word pattern, and that of the class {own or 'unknown'!r} (auto_map in "
            f"tokenizer_config.json) is not known here; known are {', '.join(_TIKTOKEN_CLASSES)}. Put a tokenizer.json "
            f"beside it."
        )
    pattern, num_special = _TIKTOKEN_CLASSES[own]
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranked = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except _MALFORMED as error:
        raise _damaged(path, f"{type(error).__name__} {error}") from error
    tokenizer = _tokenizer(ranked, [], word_split(pattern), path)
    ids = range(len(ranked), len(ranked) + num_special)
    tokenizer.add_tokens([settings.numbered.get(i) or unnamed_token(i) for i in ids])
    return tokenizer


def word_split(pattern: str) -> Any:
    """A pre-tokenizer: words as the pattern finds them, in the byte-level alphabet."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _tokenizer(ranked: Mapping[bytes, int], names: list[str], split: Any, path: Path) -> Tokenizer:
    """Ids: those of `names` first, then the ranks."""
    if sorted(ranked.values()) != list(range(len(ranked))) or not {bytes([byte]) for byte in range(256)} <= set(ranked):
        raise _damaged(path, "its ranks are not the numbers from 0, or a byte has none")
    alphabet = _byte_alphabet()
    spelled = {token: "".join([alphabet[byte] for byte in token]) for token in ranked}
    vocabulary = {name: i for i, name in enumerate(names)}
    vocabulary |= {spelled[token]: rank + len(names) for token, rank in ranked.items()}
    if len(vocabulary) != len(names) + len(ranked):
        raise _damaged(path, "a special token is an ordinary one, too")
    merges = [(spelled[left], spelled[right]) for left, right in _merges(ranked)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(ranked: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens whose union is a token, by the rank of the union."""
    found = [
        (rank, ranked[token[:cut]], ranked[token[cut:]], token[:cut], token[cut:])
        for token, rank in ranked.items()
        for cut in range(1, len(token))
        if token[:cut] in ranked and token[cut:] in ranked
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _byte_alphabet() -> dict[int, str]:
    """Byte -> character of the byte-level alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def _class_of(config: Mapping[str, Any]) -> str:
    """The Python class that a tokenizer_config.json names for its tokenizer, as `module.Class`; "" for none."""
    named = config.get("auto_map")
    named = named.get("AutoTokenizer") if isinstance(named, dict) else named
    first = next((name for name in named if isinstance(name, str)), "") if isinstance(named, list) else named
    return first.rpartition("--")[2] if isinstance(first, str) else ""


def _damaged(path: Path, reason: str) -> ModelPathError:
    return ModelPathError(f"{path} holds no tokenizer that can be loaded: {reason}. Fetch it again.")

"""load_tokenizer: the tokenizer of a folder or .gguf file.

tokenizer.json is taken as it is: normalizer, word rule, model, decoder and the tokens around a text. The class that
tokenizer_config.json names has no say: `AutoTokenizer` of transformers 5 puts the class's own rules in their place, so
that leading spaces vanish (LlamaTokenizer) or digits are cut otherwise (Qwen2Tokenizer). The files beside it add to it:

- tokens that only tokenizer_config.json, added_tokens.json or special_tokens_map.json name (`added_tokens`);
- `add_bos_token` and `add_eos_token` where tokenizer.json puts nothing at that end of a text (`text_ends`).

One exception: Mistral has published tokenizer.json files with the word pattern of another model. Where tekken.json lies
beside one, its pattern counts.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from max_ray.errors import ModelPathError
from max_ray.gguf import read_gguf
from max_ray.log import get_logger
from max_ray.tokenization.loading.added_tokens import add_tokens
from max_ray.tokenization.loading.chat_template import read_chat_template
from max_ray.tokenization.loading.folder import is_gguf
from max_ray.tokenization.loading.loaded import LoadedTokenizer
from max_ray.tokenization.loading.ranks import (
    TEKKEN_FILE,
    TEKKEN_PATTERN,
    TIKTOKEN_FILE,
    is_tekken,
    read_tekken,
    read_tiktoken,
    tekken_pattern,
    word_split,
)
from max_ray.tokenization.loading.settings import TokenizerSettings
from max_ray.tokenization.loading.text_ends import add_text_ends

_FILE = "tokenizer.json"
_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)  # what wrong files raise
_logger = get_logger(__name__)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder or .gguf file: a LoadedTokenizer, or what AutoTokenizer gives for older files.

    Raises ModelPathError where none can be loaded, ConfigError for a file beside it that is malformed.
    """
    if is_gguf(folder):
        return _load_gguf(folder)
    settings = TokenizerSettings.read(folder)
    if (folder / _FILE).is_file():
        tokenizer = _read_tokenizer_json(folder)
        _correct_mistral(tokenizer, folder)
    elif (folder / TEKKEN_FILE).is_file():
        tokenizer, names = read_tekken(folder)
        settings = replace(settings, names={**names, **settings.names})
    elif (folder / TIKTOKEN_FILE).is_file():
        tokenizer = read_tiktoken(folder, settings)
    else:
        return _load_older(folder, settings)
    add_tokens(tokenizer, settings, folder)
    add_text_ends(tokenizer, settings)
    return LoadedTokenizer(tokenizer, settings.names, read_chat_template(folder, settings.config))


def _read_tokenizer_json(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(folder / _FILE))
    except Exception as error:  # the library raises Exception itself for a malformed file
        reason = " ".join(str(error).split())
        raise ModelPathError(
            f"{folder} holds no tokenizer that can be loaded: {reason}. Fetch tokenizer.json and "
            f"tokenizer_config.json again."
        ) from error


def _correct_mistral(tokenizer: Tokenizer, folder: Path) -> None:
    """Takes the word pattern of tekken.json where that lies beside. Says so where it is missing and seems needed."""
    pattern, current = tekken_pattern(folder), tokenizer.pre_tokenizer
    if current is None or not _is_byte_level(tokenizer.decoder):
        return
    if pattern is not None and _patterns(current) != _patterns(word_split(pattern)):
        _logger.info("%s: the word pattern of %s replaces the one of %s.", folder, TEKKEN_FILE, _FILE)
        tokenizer.pre_tokenizer = word_split(pattern)
    elif pattern is None and is_tekken(tokenizer) and _patterns(current) != _patterns(word_split(TEKKEN_PATTERN)):
        _logger.warning(
            "%s: the tokens of %s are Mistral's Tekken, but it cuts words by another pattern. Some of Mistral's files "
            "are wrong in this: put the model's %s beside it, unless it was trained so.",
            *(folder, _FILE, TEKKEN_FILE),
        )


def _is_byte_level(decoder: Any) -> bool:
    return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()


def _patterns(pre_tokenizer: Any) -> list[Any]:
    """The patterns that cut words, and whether the byte-level step has its own."""
    state = json.loads(pre_tokenizer.__getstate__())
    steps = state.get("pretokenizers", [state])
    return [step.get("pattern", step.get("use_regex")) for step in steps]


def _load_older(folder: Path, settings: TokenizerSettings) -> Any:
    """Of tokenizer.model, vocab.txt, or vocab.json and merges.txt: what the class of transformers makes of them."""
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, *_MALFORMED) as error:
        raise ModelPathError(
            f"{folder} holds no tokenizer that can be loaded: put the model's tokenizer.json and "
            f"tokenizer_config.json beside config.json."
        ) from error
    if loaded.chat_template is None:
        loaded.chat_template = read_chat_template(folder, settings.config)
    return loaded


def _load_gguf(path: Path) -> LoadedTokenizer:
    """The tokenizer that a .gguf file holds."""
    from max_ray.gguf.tokenizer import build_tokenizer

    built = build_tokenizer(read_gguf(path))
    return LoadedTokenizer(built.tokenizer, built.names, built.chat_template)

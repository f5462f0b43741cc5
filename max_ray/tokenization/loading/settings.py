"""TokenizerSettings: what the files beside tokenizer.json say of special and added tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from max_ray.errors import ConfigError
from max_ray.tokenization.loading.folder import read_json

CONFIG_FILE = "tokenizer_config.json"
_MAP_FILE = "special_tokens_map.json"
_ADDED_FILE = "added_tokens.json"
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True)
class TokenizerSettings:
    """names: text of a special token by its role (`bos_token`, ...).

    numbered: added tokens by the id that the files give them. special: special tokens without one.
    adds_bos, adds_eos: whether texts begin and end with these tokens, should tokenizer.json not say it.
    splits_special: whether special tokens in a text are taken as ordinary characters.
    config: tokenizer_config.json.
    """

    names: dict[str, str]
    numbered: dict[int, AddedToken]
    special: tuple[AddedToken, ...]
    adds_bos: bool
    adds_eos: bool
    splits_special: bool
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> TokenizerSettings:
        """The settings in a folder; files that are not there say nothing. Raises ConfigError."""
        config, special_map = read_json(folder / CONFIG_FILE), read_json(folder / _MAP_FILE)
        # As transformers reads them: the map is older, and counts for more where the config has no added tokens.
        merged = {**special_map, **config} if "added_tokens_decoder" in config else {**config, **special_map}
        special = {token.content: token for token in _special_tokens(merged, folder)}
        numbered = dict(_numbered(config, folder))
        for content, number in read_json(folder / _ADDED_FILE).items():
            token = special.get(content) or AddedToken(content, special=False, normalized=True)
            numbered.setdefault(_number(number, folder / _ADDED_FILE), token)
        with_number = {token.content for token in numbered.values()}
        return cls(
            names={role: _token(merged[role], folder).content for role in _ROLES if merged.get(role)},
            numbered=numbered,
            special=tuple(token for content, token in special.items() if content not in with_number),
            adds_bos=config.get("add_bos_token") is True,
            adds_eos=config.get("add_eos_token") is True,
            splits_special=config.get("split_special_tokens") is True,
            config=config,
        )


def _special_tokens(merged: Mapping[str, Any], folder: Path) -> Iterator[AddedToken]:
    for role in _ROLES:
        if merged.get(role):
            yield _token(merged[role], folder)
    for key in _LISTS:
        listed = merged.get(key) or []
        listed = list(listed.values()) if isinstance(listed, dict) else listed
        if not isinstance(listed, list):
            raise ConfigError(f"{folder / CONFIG_FILE} or {_MAP_FILE}: {key} must be a list, not {listed!r}.")
        yield from (_token(value, folder) for value in listed if value != "")


def _numbered(config: Mapping[str, Any], folder: Path) -> Iterator[tuple[int, AddedToken]]:
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise ConfigError(f"{folder / CONFIG_FILE}: added_tokens_decoder must be an object, not {added!r}.")
    for number, value in added.items():
        special = isinstance(value, dict) and value.get("special") is True
        yield _number(number, folder / CONFIG_FILE), _token(value, folder, special=special)


def _token(value: Any, folder: Path, *, special: bool = True) -> AddedToken:
    """A token given by its text or by an object with its flags."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise ConfigError(f"{folder / CONFIG_FILE} or {_MAP_FILE} names {value!r} as a token; that must be a text.")
    flags = {key: value[key] for key in _FLAGS if isinstance(value.get(key), bool)} if isinstance(value, dict) else {}
    return AddedToken(content, special=special, **flags)


def _number(value: Any, path: Path) -> int:
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise ConfigError(f"{path} gives an added token the id {value!r}; that must be a number from 0.")
    return int(text)

"""Puts the tokens that only the files beside tokenizer.json name on top of it, each with the id that they give."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from max_ray.errors import ModelPathError
from max_ray.log import get_logger
from max_ray.tokenization.loading.settings import TokenizerSettings

_MAX_UNNAMED = 1 << 16  # ids between the last known token and one that is named
_OTHER_ID = "%s: tokenizer.json gives %r the id %s, the files beside it %s. tokenizer.json counts."
_logger = get_logger(__name__)


def add_tokens(tokenizer: Tokenizer, settings: TokenizerSettings, folder: Path) -> None:
    """Tokens that tokenizer.json has already keep their id and the way they are found in a text.

    Those with a role (beginning of text, ...) become special, should they not be. Raises ModelPathError where the
    files give one id to two tokens.
    """
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for number, token in sorted(settings.numbered.items()):
        own = tokenizer.token_to_id(token.content)
        if own is None:
            _make_room(tokenizer, token.content, number, folder)
        elif own != number:
            _logger.warning(_OTHER_ID, folder, token.content, own, number)
        if token.content not in known:
            tokenizer.add_tokens([token])
    missing = [token for token in settings.special if token.content not in known]
    roles = [known[name] for name in settings.names.values() if name in known and not known[name].special]
    tokenizer.add_special_tokens([*missing, *(_as_special(token) for token in roles)])
    tokenizer.encode_special_tokens = settings.splits_special


def _make_room(tokenizer: Tokenizer, content: str, number: int, folder: Path) -> None:
    """Names the free ids before `number`, so that the next token gets it."""
    first, holder = next_id(tokenizer), tokenizer.id_to_token(number)
    if holder is not None:
        raise ModelPathError(
            f"{folder}: tokenizer.json has {holder!r} at the id {number}, and the files beside it have {content!r} "
            f"there. Fetch tokenizer.json and tokenizer_config.json again."
        )
    if not first <= number <= first + _MAX_UNNAMED:
        raise ModelPathError(
            f"{folder}: tokenizer.json has ids up to {first - 1}, and the files beside it give {content!r} the id "
            f"{number}. Fetch tokenizer.json and tokenizer_config.json again."
        )
    tokenizer.add_special_tokens([unnamed_token(i) for i in range(first, number)])


def next_id(tokenizer: Tokenizer) -> int:
    """The id that the next added token gets."""
    added = tokenizer.get_added_tokens_decoder()
    return max(tokenizer.get_vocab_size(with_added_tokens=False), max(added, default=-1) + 1)


def unnamed_token(number: int) -> AddedToken:
    """What stands for an id that the model's files leave without a name."""
    return AddedToken(f"<|reserved_token_{number}|>", special=True, normalized=False)


def _as_special(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        special=True,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
    )

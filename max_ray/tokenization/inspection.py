"""What a tokenizer is, and what it makes of a text: for programs that count tokens or prepare prompts themselves."""

from __future__ import annotations

import asyncio
from typing import Any

from max_ray.tokenization.tokenizer import INLINE_CHARACTERS, TextTokenizer, TokenArray, id_array

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def describe_tokenizer(tokenizer: TextTokenizer) -> dict[str, Any]:
    """The tokenizer's class, special tokens and chat template, under the names of tokenizer_config.json.

    Args:
        tokenizer: Of any task.

    Returns:
        A JSON object. Tokens that the tokenizer lacks are None. `added_tokens_decoder` is by id, as text.
    """
    loaded = tokenizer._hf
    added = {
        str(index): {"content": token.content, "special": token.special}
        for index, token in sorted(loaded.added_tokens_decoder.items())
    }
    return {
        "tokenizer_class": type(loaded).__name__,
        "chat_template": loaded.chat_template or None,
        **{role: loaded.special_tokens_map.get(role) for role in _ROLES},
        "eos_token_ids": sorted(tokenizer.eos_token_ids),
        "model_max_length": tokenizer.max_length,
        "vocab_size": tokenizer.vocab_size,
        "added_tokens_decoder": added,
    }


async def prompt_ids(tokenizer: TextTokenizer, text: str, *, add_special_tokens: bool) -> TokenArray:
    """Token ids of a prompt, as a completion would process it; of any length.

    Args:
        tokenizer: Of any task.
        text: The prompt. Long ones are encoded in a thread.
        add_special_tokens: Whether the tokens around a text are added. A text that begins with the
            beginning-of-sequence token gets no second one.

    Returns:
        int64 [n].

    Raises:
        InputError: The text is not Unicode.
    """

    def encoded() -> TokenArray:
        ids = tokenizer.encode_text(text, add_special_tokens)
        return tokenizer._with_one_bos(text, ids) if add_special_tokens else ids

    return encoded() if len(text) <= INLINE_CHARACTERS else await asyncio.to_thread(encoded)


async def text_of_ids(tokenizer: TextTokenizer, ids: list[int]) -> str:
    """The text of token ids, special tokens shown.

    Args:
        tokenizer: Of any task.
        ids: Each in the vocabulary. Long lists are decoded in a thread.

    Raises:
        InputError: An id is outside the vocabulary.
    """
    tokenizer._check_range(id_array(ids, "tokens"), "tokens")
    if len(ids) <= INLINE_CHARACTERS:
        return tokenizer.decode_ids(ids)
    return await asyncio.to_thread(tokenizer.decode_ids, ids)

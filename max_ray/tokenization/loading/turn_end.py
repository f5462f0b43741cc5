"""Which tokens end a text, or the assistant's turn in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken

from max_ray.errors import ConfigError, InputError

_ANSWER = "turn-end-probe"
_CHAT = ({"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER})

Render = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], str]


def turn_end_ids(render: Render, added: Iterable[tuple[int, AddedToken]]) -> tuple[int, ...]:
    """The added token that the template writes right behind an assistant's last message, spaces apart; () for none.

    ChatML writes <|im_end|>, Llama 3 <|eot_id|>, Gemma <end_of_turn>. A fine-tuned model stops there, also where its
    generation_config.json is still that of the base model, which knows the end of a text alone.
    render: the text of a chat with some template options. Raises nothing: a template that refuses the chat tells none.
    """
    try:
        text = render(_CHAT, {"add_generation_prompt": False})
    except InputError:
        return ()
    _, found, rest = text.rpartition(_ANSWER)
    rest = rest.lstrip() if found else ""
    ends = [(len(token.content), i) for i, token in added if token.content.strip() and rest.startswith(token.content)]
    return (max(ends)[1],) if ends else ()


def as_ids(value: Any) -> tuple[int, ...]:
    """eos_token_id as configurations have it: nothing, one id, or several. Raises ConfigError for anything else."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) for i in ids):
        raise ConfigError(f"eos_token_id must be a token id or a list of token ids, not {value!r}.")
    return tuple(ids)

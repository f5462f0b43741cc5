"""LoadedTokenizer: a tokenizer of the `tokenizers` library with what the files beside it say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer


class LoadedTokenizer:
    """backend_tokenizer: encodes and decodes.

    special_tokens_map: text of a special token by its role (`bos_token`, `eos_token`, ...).
    chat_template: Jinja text; several by name, of which `default` and `tool_use` are used; or None.
    added_tokens_decoder: the added tokens by id.
    all_special_ids, all_special_tokens: those that leave nothing in a text.

    Names are those of `transformers`, so that its tokenizers can stand in its place.
    """

    def __init__(
        self, backend: Tokenizer, names: Mapping[str, str], chat_template: str | Mapping[str, str] | None
    ) -> None:
        self.backend_tokenizer = backend
        self.special_tokens_map = dict(names)
        self.chat_template = chat_template
        self.added_tokens_decoder: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        special = {i: token.content for i, token in self.added_tokens_decoder.items() if token.special}
        self.all_special_ids, self.all_special_tokens = list(special), list(special.values())

    def __len__(self) -> int:
        """One more than the highest id."""
        return max(self.backend_tokenizer.get_vocab_size(), *(i + 1 for i in self.added_tokens_decoder), 0)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens_map.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens_map.get("eos_token")

    @property
    def unk_token(self) -> str | None:
        return self.special_tokens_map.get("unk_token")

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self.convert_tokens_to_ids(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self.convert_tokens_to_ids(self.eos_token)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary; None for one that is not there."""
        number: int | None = self.backend_tokenizer.token_to_id(token)
        return number

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        """The vocabulary's spelling of an id; None for one without."""
        token: str | None = self.backend_tokenizer.id_to_token(token_id)
        return token

    def get_chat_template(self, chat_template: str | None = None, tools: Sequence[Any] | None = None) -> str:
        """The text of a template: one given by its name or as a text, else the model's own.

        Raises ValueError where there is none.
        """
        known = self.chat_template if isinstance(self.chat_template, Mapping) else {"default": self.chat_template}
        if chat_template is not None:
            return known.get(chat_template) or chat_template
        found = (known.get("tool_use") if tools is not None else None) or known.get("default")
        if not found:
            raise ValueError(f"No chat template is the default one. There are: {', '.join(sorted(known))}.")
        return found

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The text that the template makes of these messages. Raises ValueError, TypeError, jinja2.TemplateError.

        variables: for the template, `add_generation_prompt` among them; keys of messages whose value is None are
        left out.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if variables.pop("tokenize", False):
            raise ValueError("A chat template gives a text here: encode it.")
        if not conversation:
            raise ValueError("There are no messages.")
        chat = [{key: value for key, value in message.items() if value is not None} for message in conversation]
        render: Any = render_jinja_template
        rendered, _ = render(
            conversations=[chat],
            tools=tools,
            chat_template=self.get_chat_template(chat_template, tools),
            **{**self.special_tokens_map, **variables},
        )
        return str(rendered[0])

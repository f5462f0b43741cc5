"""LoadedTokenizer: a tokenizer of the `tokenizers` library with what the files beside it say."""

from __future__ import annotations

from collections.abc import Mapping

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

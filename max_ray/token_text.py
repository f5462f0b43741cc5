"""The bytes and the printable form of single tokens, for log probabilities.

`decode` of one token cannot serve: a token may hold part of a character, and decoders drop the first space of a text.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from max_ray.tokenizer import TextTokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=4)
def token_text_of(tokenizer: TextTokenizer) -> TokenText:
    """The one TokenText of a tokenizer: what it has looked up serves all requests."""
    return TokenText(tokenizer)


class TokenText:
    """Looks tokens up in one tokenizer's vocabulary and remembers them."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_level = '"ByteLevel"' in tokenizer.decoder_description()
        self._is_glued = tokenizer.decoder_description().startswith('{"type":"ByteLevel"')
        self._whole: dict[int, str | None] = {}
        self._known: dict[int, tuple[bytes, str]] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to the text. Special tokens give their name."""
        return self._look_up(token_id)[0]

    def text_of(self, token_id: int) -> str:
        r"""The bytes as text, or `bytes:\xe4\xbd` where they are no whole characters (as OpenAI writes it)."""
        return self._look_up(token_id)[1]

    def whole_text_of(self, token_id: int) -> str | None:
        """What the token adds to a text without special tokens, if that is the same wherever it stands: so it is where
        texts are glued byte by byte and the token's bytes are whole characters. None otherwise."""
        if not self._is_glued:
            return None
        try:
            return self._whole[token_id]
        except KeyError:
            return self._whole.setdefault(token_id, self._find_whole(token_id))

    def _find_whole(self, token_id: int) -> str | None:
        if self.is_special(token_id):
            return ""
        text = self.text_of(token_id)
        is_whole = token_id not in self._tokenizer.added_ids and text.encode() == self.bytes_of(token_id)
        return text if is_whole and not text.endswith("\ufffd") else None

    def is_special(self, token_id: int) -> bool:
        """True for tokens that leave nothing in the text."""
        return token_id in self._tokenizer.special_ids

    def _look_up(self, token_id: int) -> tuple[bytes, str]:
        found = self._known.get(token_id)
        if found is None:
            raw = self._bytes(token_id)
            found = self._known[token_id] = (raw, _printable(raw))
        return found

    def _bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.token_piece(token_id)
        if token_id in self._tokenizer.added_ids:
            return piece.encode()
        if self._byte_level:
            table = _byte_level_alphabet()
            return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()
        match = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else piece.replace("\u2581", " ").encode()


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level BPE alphabet (Radford et al. 2019, GPT-2): printable Latin-1 characters
    stand for themselves, the other bytes in order for the characters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in plain}
    others = [b for b in range(256) if b not in set(plain)]
    return table | {chr(0x100 + i): b for i, b in enumerate(others)}


def _printable(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)

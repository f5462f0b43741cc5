"""What single tokens are: their bytes and their printable form, for log probabilities, and what detokenizers ask.

`decode` of one token cannot serve: a token may hold part of a character, and decoders drop the first space of a text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from max_ray.tokenization.detokenizer import (
    ByteDetokenizer,
    Detokenizer,
    IncrementalDetokenizer,
    SpecialStopStringMatcher,
    StopStringMatcher,
)

if TYPE_CHECKING:
    from max_ray.tokenization.tokenizer import TextTokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Of a prompt: where its last visible token is looked for, and how many tokens of a run of bytes are looked at.
_LOOK_BACK = 256
_MAX_CONTEXT = 16


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
        self._decode = partial(tokenizer.decode_ids, skip_special_tokens=True)
        names = [name for name in tokenizer.special_names if name]
        self._special_names = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._whole: dict[int, str | None] = {}
        self._known: dict[int, tuple[bytes, str]] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to the text. Special tokens give their name."""
        return self._look_up(token_id)[0]

    def text_of(self, token_id: int) -> str:
        r"""The bytes as text, or `bytes:\xe4\xbd` where they are no whole characters (as OpenAI writes it)."""
        return self._look_up(token_id)[1]

    def detokenizer(
        self, prompt: Sequence[int] | npt.NDArray[np.int64] = (), shown: Set[int] = frozenset()
    ) -> Detokenizer:
        """A detokenizer for what follows a prompt.

        Args:
            prompt: Its tokens; the last ones are taken.
            shown: Special tokens that stand in the text by their names. The others are left out.
        """
        detokenizer: Detokenizer
        if self._is_glued and shown:
            names = {token: self._tokenizer.token_piece(token) for token in shown}
            detokenizer = ByteDetokenizer(
                lambda token: names[token] if token in names else self.whole_text_of(token),
                lambda token: names[token].encode() if token in names else self._decoded_bytes(token),
            )
        elif self._is_glued:
            detokenizer = ByteDetokenizer(self.whole_text_of, self._decoded_bytes)
        elif shown:
            detokenizer = IncrementalDetokenizer(
                self._tokenizer.decode_ids, lambda token: token not in shown and self._is_hidden(token)
            )
        else:
            detokenizer = IncrementalDetokenizer(self._decode, self._is_hidden)
        end = prompt[-_LOOK_BACK:]
        detokenizer.prime(self._context(end.tolist() if isinstance(end, np.ndarray) else end))
        return detokenizer

    def stop_matcher(self, stop: Sequence[str], *, includes_stop: bool = False) -> StopStringMatcher:
        """Stop strings that hold a special token's name are looked for in the text with special tokens shown.

        Args:
            stop: The stop strings.
            includes_stop: Whether the stop string that ends the text is given out with it.
        """
        special = [s for s in stop if self._special_names.search(s)]
        if not special:
            return StopStringMatcher(stop, includes_stop=includes_stop)
        plain = [s for s in stop if s not in special]
        return SpecialStopStringMatcher(plain, special, includes_stop=includes_stop)

    def whole_text_of(self, token_id: int) -> str | None:
        """What the token adds to a text without special tokens, if that is the same wherever it stands: so it is where
        texts are glued byte by byte and the token's bytes are whole characters. None otherwise."""
        if not self._is_glued:
            return None
        try:
            return self._whole[token_id]
        except KeyError:
            return self._whole.setdefault(token_id, self._find_whole(token_id))

    def is_special(self, token_id: int) -> bool:
        """True for tokens that leave nothing in the text."""
        return token_id in self._tokenizer.special_ids

    def _context(self, end: Sequence[int]) -> list[int]:
        """The end of a prompt from its last visible token on that needs no other one to be a text."""
        tokens: list[int] = []
        for token in reversed(end):
            if self._is_hidden(token):
                continue
            tokens.append(token)
            if self._stands_alone(token) or len(tokens) == _MAX_CONTEXT:
                break
        if len(tokens) == _MAX_CONTEXT:  # cut somewhere in a run of bytes: it is to begin with a character
            while len(tokens) > 1 and self._continues_character(tokens[-1]):
                tokens.pop()
        return tokens[::-1]

    def _continues_character(self, token_id: int) -> bool:
        """True for a byte token that is not the first byte of a character."""
        return not self._is_glued and not self._stands_alone(token_id) and self.bytes_of(token_id)[0] & 0xC0 == 0x80

    def _stands_alone(self, token_id: int) -> bool:
        """True for a token that is no part of a character."""
        if self._byte_level:
            return not self.text_of(token_id).startswith("bytes:") or token_id in self._tokenizer.added_ids
        return _BYTE_PIECE.fullmatch(self._tokenizer.token_piece(token_id)) is None

    def _is_hidden(self, token_id: int) -> bool:
        return token_id in self._tokenizer.special_ids or not self._look_up(token_id)[0]

    def _decoded_bytes(self, token_id: int) -> bytes:
        """What a byte-level decoder makes of the token; of an added token, too, whatever it is meant to be."""
        return b"" if self.is_special(token_id) else _byte_level(self._tokenizer.token_piece(token_id))

    def _find_whole(self, token_id: int) -> str | None:
        try:
            text = self._decoded_bytes(token_id).decode()
        except UnicodeDecodeError:
            return None
        return text

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
            return _byte_level(piece)
        match = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else piece.replace("\u2581", " ").encode()


def _byte_level(piece: str) -> bytes:
    table = _byte_level_alphabet()
    return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()


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

"""Text of a wanted number of tokens, made of common English words.

Without a tokenizer a word counts as one token, which common words are in nearly every vocabulary. With one, the text is
cut until the tokenizer itself counts exactly the wanted number.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Protocol

from max_ray.errors import ConfigError

_COMMON = """
able about above across act add after again age ago air all almost alone along also always among and animal answer
any area arm around art ask away back bad ball bank base bear beat bed before began behind best better between big
bird black blue board boat body book both box boy bring brown build burn bus but buy call came can car care carry
case cat catch center chair chance change check child choose city class clean clear close cloud coast cold color
come common cook cool copy corn cost could count country course cover cross cry cut dance dark day dead deal decide
deep did doctor dog door down draw dream dress drink drive drop dry during each ear early earth east easy eat edge
egg eight else end energy enough even ever every eye face fact fall family far farm fast father fear feed feel feet
few field fight fill final find fine fire first fish five flat floor flow flower fly follow food foot force form
four free friend from front fruit full game garden gas gave get girl give glad glass gold gone good got govern grand
grass great green ground group grow guess guide gun had hair half hand happy hard has hat head hear heart heat heavy
held help her here high hill him his hold hole home hope horse hot hour house how huge human hunt ice idea inch iron
island job join jump just keep kept key kill kind king knew know lady lake land large last late laugh law lay lead
learn leave left leg length less let letter level lie life lift light like line list listen little live long look
lost lot loud love low machine made main make man many map mark market mass may mean meat meet men method middle
might mile milk mind mine minute miss modern moment money month moon more morning most mother mountain mouth move
much music must name nation near neck need never new next night nine noise north nose note nothing now number object
ocean off offer office often oil old once one only open order other our out over own page paint pair paper part
party pass past path pay people perhaps person piece place plain plan plane plant play please point poor port pose
power press pretty print problem process produce proper prove provide pull push put question quick quiet quite race
radio rain raise ran reach read ready real reason record red remember rest result rich ride right ring rise river
road rock room root rope rose round row rule run safe said sail salt same sand sat saw say school science sea season
seat second see seem self sell send sense serve set seven shape share sharp she ship shoe shop shore short should
show side sign silent simple since sing sister sit six size skill skin sky sleep slow small smell smile snow soft
soil some son song soon sound south space speak speed spell spend spoke spot spread spring square stand star start
state stay steam steel step stick still stone stop store story street string strong student study such sugar summer
sun sure table tail take talk tall teach team tell ten test than thank that the their them then there these they
thick thin thing think third this those though thought three through time tiny tire told tone too took tool top
total touch toward town track trade train travel tree trip trouble truck true try turn two type under unit until use
usual valley value very view village visit voice wait walk wall want war warm was wash watch water wave way wear
weather week weight well went were west what wheel when where which while white who whole why wide wife wild will
win wind window winter wire wish with woman wonder wood word work world would write wrong year yes yet you young
your
"""
WORDS = tuple(_COMMON.split())
_TRIES = 200
_CHARACTERS_PER_TOKEN = 4  # of real English text, for counting without a tokenizer
_ANY_LENGTH = 2**31 - 1


class Words(Protocol):
    """A source of text. The same random state gives the same text."""

    def text(self, random: Random, num_tokens: int, prefix: str = "") -> str:
        """`prefix` and random words after it, `num_tokens` tokens in all."""

    def count(self, text: str) -> int:
        """Tokens of a text."""


class CommonWords:
    """Words counted as one token each: about right with any tokenizer, exact with none."""

    def text(self, random: Random, num_tokens: int, prefix: str = "") -> str:
        known = prefix.split()
        return " ".join([*known, *random.choices(WORDS, k=num_tokens - len(known))])

    def count(self, text: str) -> int:
        return max(1, round(len(text) / _CHARACTERS_PER_TOKEN))


class TokenizerWords:
    """Exact counts by the tokenizer of a model folder.

    with_special_tokens: a prompt includes what the tokenizer adds to one (a beginning-of-sequence token), as servers
    do for the completions endpoint. What a chat template adds is never counted.
    """

    def __init__(self, folder: str | Path, *, with_special_tokens: bool) -> None:
        from max_ray.tokenization.tokenizer import (
            TextTokenizer,  # imports `transformers`: seconds, and only needed here
        )

        self._tokenizer = TextTokenizer(folder, max_length=_ANY_LENGTH, generation_config={})
        self._num_special = len(self._tokenizer.encode_text("")) if with_special_tokens else 0

    def text(self, random: Random, num_tokens: int, prefix: str = "") -> str:
        """Raises ConfigError for a number that cannot be reached."""
        wanted = num_tokens - self._num_special
        for _ in range(_TRIES if wanted > 0 else 0):
            ids = self._ids(CommonWords().text(random, len(prefix.split()) + wanted, prefix))
            text = self._tokenizer.decode_ids(ids[:wanted])
            if text.startswith(prefix) and len(self._ids(text)) == wanted:
                return text
        raise ConfigError(f"No prompt of exactly {num_tokens} tokens was found for this tokenizer; try another length.")

    def count(self, text: str) -> int:
        return len(self._ids(text)) + self._num_special

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode_text(text, add_special_tokens=False).tolist()
        return ids

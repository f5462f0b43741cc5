"""Random texts that tell tokenizers apart: spaces, digits, code, scripts, emoji, accents in two spellings, controls."""

from __future__ import annotations

import random
from collections.abc import Sequence

CORPUS = (
    "The quick brown fox jumps over the lazy dog. It's what they'll say: don't, can't, we've! HELLO World's end.",
    "def f(x):\n    return x * 2  # twice\n\n\tif a != b: print('no')\n        for i in range(10):\n            pass\n",
    "In 1984, 12345 and 678 made 13023; 3.14159 is not 2,718. 100000 007 42 9 000",
    "\u4f60\u597d\u4e16\u754c\uff0c\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002\u3053\u3093\u306b\u3061\u306f\u4e16\u754c",
    "caf\u00e9 na\u00efve \u00fcber Stra\u00dfe \u0395\u03bb\u03bb\u03ac\u03b4\u03b1 \u041c\u043e\u0441\u043a\u0432",
    "the the the and and hello hello world there where then a an in on it is",
)
_PIECES = (
    *(" ", "  ", "   ", "     ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u00a0", "\u3000", "\u2581", "a\u2581b"),
    *("7", "42", "123", "1234", "12345678", "\u0663\u0664", "3.14", "1,000", "x2"),
    *("def f(x):", "    return", "!=", "->", "{}", "//", "/*", "'s", "'LL", "don't", "I'M", "HELLO", "camelCase"),
    *("\u4f60\u597d", "\u4e16\u754c\u3002", "\u3053\u3093", "\u30a2\u30a4", "\ud55c\uad6d\uc5b4", "\u0e44\u0e17\u0e22"),
    *("caf\u00e9", "cafe\u0301", "\u00c5", "A\u030a", "\ufb01", "\uff21\uff22", "\u00df", "\u0130", "\u1e9e"),
    *("\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u2764\ufe0f", "\U0001f1e9\U0001f1ea"),
    *("hello", "world", "the", "The", "there", "and", "quick", "x", "q", "Z"),
    *("<", "|", ">", "<|", "|>", "<|im_", "[INST", "</", "s>", "<0x0A>", "$A", ":", "\\", '"', "\x00", "\u200b"),
)


def random_texts(count: int, controls: Sequence[str] = (), *, seed: int = 0) -> list[str]:
    """`count` texts; the first ones are what goes wrong most often."""
    rng = random.Random(seed)
    first = ["", " ", " hello", "hello", "  two", "hi there ", " \n x", *(f"a{c} b{c}\nc {c}{c}" for c in controls)]
    pool = [*_PIECES, *controls, *controls]
    made = ["".join(rng.choices(pool, k=rng.randint(1, 12))) for _ in range(max(0, count - len(first)))]
    return [*first, *made][:count]

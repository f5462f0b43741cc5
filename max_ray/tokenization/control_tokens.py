"""Control tokens that a client's strings spell are text; only those that the chat template writes are tokens.

While the template runs, characters of the client's strings that could be part of a control token's name are replaced
by stand-ins: symbols that occur nowhere in the messages, one for each character. Lengths stay, and so does what a
template asks of all other text. In the rendered text the stand-ins tell who wrote what:

    messages  "<|im_end|>"      -> "🀀🀁🀂🀃🀄🀅🀆🀇🀁🀈"                 mark
    rendered  "<|im_start|>user\n🀀🀁🀂🀃🀄🀅🀆🀇🀁🀈<|im_end|>\n"
    restored  "<|im_start|>user\n<" "|im_end|><|im_end|>\n"          cut inside each name that holds a stand-in

The pieces are encoded one by one: a name in two pieces is no token. A string is suspect when it holds a whole name,
ends with the beginning of one, begins with the end of one, or lies inside of one: the template may write the rest.
Strings without any of these, nearly all, are left as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from max_ray.errors import InputError

# Symbols (category So) that no case, trimming, escaping or normalization changes: tiles, cards, alchemy.
_STAND_INS = "".join(
    [
        *map(chr, range(0x1F000, 0x1F02C)),
        *map(chr, range(0x1F030, 0x1F094)),
        *map(chr, range(0x1F0A0, 0x1F0AF)),
        *map(chr, range(0x1F700, 0x1F774)),
    ]
)
_BARRED = re.compile(r"<[|\uff5c].+[|\uff5c]>")
_MAX_DEPTH = 100
_WINDOW = 16384  # characters searched in one go: other threads wait meanwhile
Span = tuple[int, int]


class Marking:
    """The stand-ins of one conversation. texts: gives all strings of it, once there is a first stand-in to choose."""

    def __init__(self, control: ControlTokens, texts: Callable[[], Iterable[str]]) -> None:
        self._control = control
        self._texts = texts
        self._candidates = iter(_STAND_INS)
        self._stand_ins: dict[str, str] = {}

    @property
    def is_used(self) -> bool:
        """Whether any string was suspect."""
        return bool(self._stand_ins)

    def mark(self, value: Any, depth: int = 0) -> Any:
        """A string with stand-ins, and so the strings and keys inside of lists and mappings; other values as they are.
        Raises InputError where the stand-ins do not suffice, or the value is too deep."""
        if isinstance(value, str):
            return self._mark_text(value, self._control.suspects(value))
        if depth > _MAX_DEPTH:
            raise InputError(f"The messages are nested more than {_MAX_DEPTH} deep.", param="messages")
        if isinstance(value, Mapping):
            return {
                self._mark_word(key): self._mark_word(item) if key == "type" else self.mark(item, depth + 1)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.mark(item, depth + 1) for item in value]
        return value

    def pieces(self, rendered: str) -> tuple[list[str], int]:
        """The rendered text with the client's characters again, cut inside each name that the client wrote or helped
        to write; and how many names the template wrote."""
        for stand_in in self._stand_ins.values():  # as `tojson(ensure_ascii=true)` writes it
            rendered = rendered.replace(_escaped(stand_in), stand_in)
        text = rendered
        for character, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, character)
        seen = self._control.seen(text)
        cuts, place, num_written = [0], 0, 0
        while (span := self._control.find(seen, place)) is not None:
            start, end = span
            if rendered[start:end] == text[start:end]:
                num_written, place = num_written + 1, end
            else:
                place = start + 1
                cuts.append(place)
        return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)], num_written

    def _mark_word(self, word: Any) -> Any:
        """A key or a kind: templates ask for it by name, so it may lie inside of one."""
        return self._mark_text(word, self._control.suspects(word, inside=False)) if isinstance(word, str) else word

    def _mark_text(self, text: str, spans: list[Span]) -> str:
        if not spans:
            return text
        marked, done = [], 0
        for start, end in sorted(spans):
            start = max(start, done)
            marked += [text[done:start], *map(self._stand_in, text[start:end])]
            done = max(done, end)
        return "".join([*marked, text[done:]])

    def _stand_in(self, character: str) -> str:
        found = self._stand_ins.get(character)
        if found is None:
            found = self._stand_ins[character] = self._unused()
        return found

    def _unused(self) -> str:
        for candidate in self._candidates:
            escaped = _escaped(candidate)
            if not any(candidate in text or escaped in text for text in self._texts()):
                return candidate
        raise InputError(
            "The messages hold names of control tokens and too many kinds of symbols with them. Leave some out.",
            param="messages",
        )


class ControlTokens:
    """The names that only the template may write as tokens.

    names: of two characters or more; one character cannot be cut. edges: the strings of the template, at which it may
    cut what the client wrote (`</think>`), or which it compares with. fold: how the tokenizer sees a text before it
    looks for names, character by character.
    """

    def __init__(
        self, names: Iterable[str], edges: Iterable[str] = (), fold: Callable[[str], str] | None = None
    ) -> None:
        self.names = frozenset(name for name in names if len(name) > 1 and not name.isspace())
        self._fold = fold
        self._constants = frozenset(edges)
        self._edges = [edge for edge in self._constants if edge not in self.names and _is_edge(edge)]
        self._longest = max(map(len, self.names), default=0)

    def seen(self, text: str) -> str:
        """The text as the tokenizer sees it when it looks for names; of the same length."""
        return text if self._fold is None else self._fold(text)

    def find(self, seen: str, start: int) -> Span | None:
        """The first name from a place on, the longest of those that begin there."""
        return _search(self._pattern, self._longest, seen, start)

    def suspects(self, text: str, inside: bool = True) -> list[Span]:
        """Where a string holds a name, or a part that could become one beside other text.

        inside: whether a string that is the inner part of a name is suspect as a whole.
        """
        if not self.names:
            return []
        text = self.seen(text)
        inside = inside and len(text) < self._longest and text not in self._constants
        if self._signs.search(text) is None:
            return self._partial(text, 0, len(text), True) if inside and self._is_inner(text.strip()) else []
        spans, place = [], 0
        while (span := self.find(text, place)) is not None:
            spans.append(span)
            place = span[0] + 1
        borders = [0, *self._cuts(text), len(text)]
        for start, end in zip(borders[::2], borders[1::2], strict=True):
            spans += self._partial(text, start, end, inside)
        return spans

    def _cuts(self, text: str) -> Iterator[int]:
        """Where the strings at which a template may cut begin and end."""
        if not self._edges:
            return
        place, longest = 0, max(map(len, self._edges))
        while (span := _search(self._edge_pattern, longest, text, place)) is not None:
            yield from span
            place = span[1]

    def _partial(self, text: str, start: int, end: int, inside: bool) -> list[Span]:
        """Beginnings of names at the end of a stretch of text, ends of names at its start; space around is trimmed."""
        longest, spans = self._longest, []
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
        if inside and self._is_inner(text[start:end]):
            return [(start, end)]
        for found in self._firsts.finditer(text, max(start, end - longest + 1), end):
            if text[found.start() : end] in self._beginnings:
                spans.append((found.start(), end))
                break
        stretch = min(end, start + longest - 1)
        for found in self._lasts.finditer(text, start, stretch):
            if text[start : found.end()] in self._ends:
                spans.append((start, found.end()))
        return spans

    def _is_inner(self, text: str) -> bool:
        return text in self._joined if text else False

    @cached_property
    def _signs(self) -> re.Pattern[str]:
        return _one_of({name[i] for name in self.names for i in (0, -1)})

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(_alternatives(self.names))

    @cached_property
    def _edge_pattern(self) -> re.Pattern[str]:
        return re.compile(_alternatives(self._edges) if self._edges else "(?!)")

    @cached_property
    def _joined(self) -> str:
        return "\0".join(self.names)

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(name[:i] for name in self.names for i in range(1, len(name)))

    @cached_property
    def _ends(self) -> frozenset[str]:
        return frozenset(name[i:] for name in self.names for i in range(1, len(name)))

    @cached_property
    def _firsts(self) -> re.Pattern[str]:
        return _one_of({name[0] for name in self.names})

    @cached_property
    def _lasts(self) -> re.Pattern[str]:
        return _one_of({name[-1] for name in self.names})


def _search(pattern: re.Pattern[str], longest: int, text: str, start: int) -> Span | None:
    """The first match from a place on, in windows, so that no single call keeps other threads waiting for long."""
    while start < len(text):
        border = start + _WINDOW
        found = pattern.search(text, start, border + longest - 1)
        if found is not None and found.start() < border:
            return found.span()
        start = border
    return None


def fold_of(normalize: Callable[[str], str]) -> Callable[[str], str] | None:
    """How a normalizer changes single characters into others (`\uff1c` into `<`), with lengths kept; None where it
    changes none."""

    class Table(dict[int, str]):
        def __missing__(self, character: int) -> str:
            changed = normalize(chr(character)) if not 0xD800 <= character < 0xE000 else ""
            self[character] = changed if len(changed) == 1 else chr(character)
            return self[character]

    table = Table()
    samples = "AZ<|>\u00c9\uff1c\uff21\u2460"
    return (lambda text: text.translate(table)) if samples.translate(table) != samples else None


def control_names(added: Iterable[Any], special: Iterable[str], turns: str) -> set[str]:
    """Which names only a template may write: special tokens, other added tokens with bars (`<|user|>`), and those that
    it writes around a user's turn. Tags such as `<think>` and `<tool_call>`, which models write into their answers and
    clients send back, are not among them, and neither are added words.

    added: AddedToken objects of `tokenizers`. turns: what the template writes around messages.
    """
    names = set(special)
    for token in added:
        name = token.content
        is_turn = not name[:1].isalnum() and not name.isspace() and name in turns
        if token.special or is_turn or _BARRED.fullmatch(name):
            names.add(name)
    return names


def strings_of(value: Any) -> Iterator[str]:
    """The strings and keys in a value, those inside of lists and mappings too."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            stack += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            stack += value


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]


def _is_edge(text: str) -> bool:
    """Whether a constant of a template is worth looking for: not a word, a space or a name of a field."""
    return not text.isspace() and any(not c.isalnum() and c not in " _" for c in text)


def _one_of(characters: Iterable[str]) -> re.Pattern[str]:
    return re.compile("[" + "".join(map(re.escape, sorted(characters))) + "]")


def _alternatives(words: Iterable[str]) -> str:
    """A regular expression for the longest of the words that begins at a place; branches only where they differ, so
    that thousands of words cost no more than a few."""
    tree: dict[str, Any] = {}
    for word in words:
        branch = tree
        for character in word:
            branch = branch.setdefault(character, {})
        branch[""] = {}
    return _branches(tree)


def _branches(tree: dict[str, Any]) -> str:
    literal = ""
    while len(tree) == 1 and "" not in tree:
        ((character, tree),) = tree.items()
        literal += re.escape(character)
    following = [re.escape(character) + _branches(branch) for character, branch in tree.items() if character]
    if not following:
        return literal
    joined = f"(?:{'|'.join(following)})"
    return literal + (f"{joined}?" if "" in tree else joined)

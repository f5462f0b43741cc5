"""NameMap: a table from checkpoint names to a network's own parameter names, usable in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from max_ray.errors import WeightsError

MAX_NAMED = 10
"""Names listed in one error."""
_TOKENS = re.compile(r"(\{\}|\*)")


@dataclass(frozen=True)
class OwnName:
    """A part of an own parameter; `part` is "" where the parameter has one part only."""

    parameter: str
    part: str = ""

    @classmethod
    def parse(cls, text: str) -> OwnName:
        parameter, _, part = text.partition(":")
        return cls(parameter, part)

    def __str__(self) -> str:
        return f"{self.parameter}:{self.part}" if self.part else self.parameter


@dataclass
class Renaming:
    """What a table makes of a checkpoint's names.

    sources: for every own name, the checkpoint names that lead to it (more than one is an error of the checkpoint).
    dropped: names that the table drops on purpose. unknown: names that no pattern of the table matches.
    """

    sources: dict[OwnName, list[str]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


class NameMap:
    """Pairs of a checkpoint pattern and an own pattern; the first pattern that matches a name decides.

    `{}` stands for a number (of a layer, of an expert), the same numbers in the same order on both sides. `*`, only in
    checkpoint patterns, stands for anything. `:part` at the end of an own pattern names a part of a fused parameter.
    None in place of the own pattern drops the tensor on purpose.

        NameMap([
            ("model.layers.{}.self_attn.q_proj.weight", "layers.{}.attention.qkv.weight:q"),
            ("*.rotary_emb.inv_freq", None),
        ])
    """

    def __init__(self, table: Sequence[tuple[str, str | None]]) -> None:
        for pattern, own in table:
            assert own is None or own.count("{}") == pattern.count("{}"), f"numbers differ: {pattern!r} -> {own!r}"
        self._to_own = [(_compile(pattern), own) for pattern, own in table]
        self._to_checkpoint = [(_compile(own), pattern) for pattern, own in table if own and "*" not in pattern]

    def rename(self, names: Iterable[str]) -> Renaming:
        renaming = Renaming()
        for name in names:
            matched, own = _translate(self._to_own, name)
            if not matched:
                renaming.unknown.append(name)
            elif own is None:
                renaming.dropped.append(name)
            else:
                renaming.sources.setdefault(OwnName.parse(own), []).append(name)
        return renaming

    def checkpoint_name(self, own: OwnName) -> str | None:
        """The way back: the name that a checkpoint would give to this part; None where the table does not say."""
        return _translate(self._to_checkpoint, str(own))[1]


def with_bare_names(table: Sequence[tuple[str, str | None]], prefix: str = "model.") -> list[tuple[str, str | None]]:
    """A table whose checkpoint patterns stand bare as well as behind `prefix`: a network that was saved without the
    class around it has bare names."""
    return [*table, *((theirs.removeprefix(prefix), own) for theirs, own in table if theirs.startswith(prefix))]


def mismatch(problems: Sequence[str]) -> WeightsError:
    return WeightsError(f"Checkpoint and network do not match: {'; '.join(problems)}. Is config.json its own?")


def no_place_for(names: Sequence[str]) -> str:
    return f"the network has no place for {listed(names)}"


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''} ({', '.join(names[:MAX_NAMED])}{more})"


def _compile(pattern: str) -> re.Pattern[str]:
    regex = {"{}": r"(\d+)", "*": r".*"}
    return re.compile("".join(regex.get(token) or re.escape(token) for token in _TOKENS.split(pattern) if token))


def _translate(table: Iterable[tuple[re.Pattern[str], str | None]], name: str) -> tuple[bool, str | None]:
    """(whether a pattern matches, the translated name)."""
    for pattern, target in table:
        if match := pattern.fullmatch(name):
            return True, None if target is None else _fill(target, match.groups())
    return False, None


def _fill(target: str, numbers: Sequence[str]) -> str:
    """Puts the numbers into the slots of `target`, in order."""
    pieces = target.split("{}")
    return pieces[0] + "".join(number + piece for number, piece in zip(numbers, pieces[1:], strict=True))

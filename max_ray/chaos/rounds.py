"""Rounds of a drill: one fault each, with the streams that ended; kept in a file, so that a drill can be continued."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from max_ray.chaos.faults import Injected
from max_ray.chaos.streams import Stream, longest_gap
from max_ray.chaos.verdict import Verdict
from max_ray.errors import ConfigError


@dataclass(frozen=True)
class Round:
    """One fault and what came of it.

    Args:
        number: In the schedule, from 0.
        kind: Kind of the process; "" for a round whose kind had no process.
        action: `kill` or `stop`.
        answer_s: Seconds until a new request was answered.
        replaced_s: Seconds until the process was there again, too.
        gap_s: Longest time without an event in an open stream, in seconds.
        whole: Streams that ended with the undisturbed text, those that were resumed among them.
        resumed: Streams of these that went on over another connection.
        cut: See Verdict.
        lost: See Verdict.
        different: See Verdict.
    """

    number: int
    kind: str
    action: str
    answer_s: float
    replaced_s: float
    gap_s: float
    whole: int
    resumed: int
    cut: int
    lost: int
    different: int


def round_of(number: int, injected: Injected | None, streams: Sequence[Stream], verdict: Verdict) -> Round:
    """The record of a round.

    Args:
        number: In the schedule.
        injected: The fault; None where its kind had no process.
        streams: All of the drill so far.
        verdict: On the streams that ended in it.
    """
    counts = [len(ended) for ended in (verdict.whole, verdict.resumed, verdict.cut, verdict.lost, verdict.different)]
    if injected is None:
        return Round(number, "", "", 0.0, 0.0, 0.0, *counts)
    begin, fault = injected.begin, injected.fault
    answer_s, replaced_s = round(injected.answered - begin, 3), round(injected.end - begin, 3)
    gap_s = round(longest_gap(streams, begin, injected.end), 3)
    return Round(number, fault.kind, fault.action, answer_s, replaced_s, gap_s, *counts)


class RoundFile:
    """A file with a JSON object a line: the seed and kinds, then rounds.

    Args:
        path: Of the file; None keeps nothing.
        seed: Of the schedule.
        kinds: Kinds of processes.

    Raises:
        ConfigError: The file is of another drill, or is none.
    """

    def __init__(self, path: Path | None, seed: int, kinds: Sequence[str]) -> None:
        self.rounds: list[Round] = []
        self._path = path
        head = {"seed": seed, "kinds": list(kinds)}
        if path is None:
            return
        if not path.exists():
            path.write_text(json.dumps(head) + "\n", encoding="utf-8")
            return
        try:
            first, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self.rounds = [Round(**line) for line in lines]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} holds no rounds of a drill: {error}.") from None
        if first != head:
            raise ConfigError(f"{path} is of a drill with {first}, not {head}.")

    def add(self, one: Round) -> None:
        """Keeps a round."""
        self.rounds.append(one)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(one)) + "\n")


def table(rounds: Sequence[Round]) -> list[list[str]]:
    """Rows, the heading first: per kind and action how often, until a new request was answered, until the process was
    there again, the longest gap in a stream (seconds, median and worst); then streams."""
    rows = [
        [
            *("process", "action", "times", "answer (s)", "worst", "replaced (s)", "worst", "gap (s)", "worst"),
            *("whole", "resumed", "cut", "lost", "different"),
        ]
    ]
    for kind, action in sorted({(one.kind, one.action) for one in rounds if one.kind}):
        same = [one for one in rounds if (one.kind, one.action) == (kind, action)]
        row = [kind, action, str(len(same))]
        for numbers in ([r.answer_s for r in same], [r.replaced_s for r in same], [r.gap_s for r in same]):
            row += [f"{median(numbers):.2f}", f"{max(numbers):.2f}"]
        rows.append(row + [str(count) for count in totals(same)])
    return rows


def totals(rounds: Sequence[Round]) -> list[int]:
    """Streams of rounds: whole, resumed, cut, lost, different."""
    return [sum(getattr(one, name) for one in rounds) for name in ("whole", "resumed", "cut", "lost", "different")]

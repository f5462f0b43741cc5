"""What a drill showed: a table, and what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from max_ray.chaos.faults import Injected
from max_ray.chaos.streams import Stream, longest_gap


@dataclass(frozen=True)
class Verdict:
    """Streams by their end.

    Args:
        whole: Streams with the undisturbed text.
        cut: Streams that broke because their connection's process was killed; their text was right so far.
        lost: Streams that failed otherwise.
        different: Streams with another text.
    """

    whole: list[Stream]
    cut: list[Stream]
    lost: list[Stream]
    different: list[Stream]

    @property
    def is_good(self) -> bool:
        return not self.lost and not self.different


def judge(streams: Sequence[Stream], faults: Sequence[Injected]) -> Verdict:
    """Each stream is in one list. A failure counts as a cut only while a fault that may cut was under way."""
    verdict = Verdict([], [], [], [])
    for stream in streams:
        if not stream.is_equal:
            verdict.different.append(stream)
        elif stream.failure is None:
            verdict.whole.append(stream)
        elif any(f.fault.may_cut and f.begin <= stream.end and stream.start <= f.end for f in faults):
            verdict.cut.append(stream)
        else:
            verdict.lost.append(stream)
    return verdict


def table(streams: Sequence[Stream], faults: Sequence[Injected]) -> list[list[str]]:
    """Rows, the heading first: per kind and action how often, until a new request was answered, until the process was
    there again, the longest gap in a stream; seconds, median and worst."""
    rows = [["process", "action", "times", "answer (s)", "worst", "replaced (s)", "worst", "gap (s)", "worst"]]
    for kind, action in sorted({(f.fault.kind, f.fault.action) for f in faults}):
        same = [f for f in faults if (f.fault.kind, f.fault.action) == (kind, action)]
        row = [kind, action, str(len(same))]
        for numbers in (
            [f.answered - f.begin for f in same],
            [f.end - f.begin for f in same],
            [longest_gap(streams, f.begin, f.end) for f in same],
        ):
            row += [f"{median(numbers):.2f}", f"{max(numbers):.2f}"]
        rows.append(row)
    return rows

"""What a drill showed of its streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from max_ray.chaos.faults import Injected
from max_ray.chaos.streams import Stream


@dataclass(frozen=True)
class Verdict:
    """Streams by their end.

    Args:
        whole: Streams with the undisturbed text.
        cut: Streams that broke because their connection's process was killed; their text was right so far. A resumable
            stream only where the server never had it.
        lost: Streams that failed otherwise.
        different: Streams with another text.
    """

    whole: list[Stream]
    cut: list[Stream]
    lost: list[Stream]
    different: list[Stream]

    @property
    def resumed(self) -> list[Stream]:
        """Whole streams that went on over another connection."""
        return [stream for stream in self.whole if stream.num_resumed]

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
        elif _may_be_cut(stream, faults):
            verdict.cut.append(stream)
        else:
            verdict.lost.append(stream)
    return verdict


def _may_be_cut(stream: Stream, faults: Sequence[Injected]) -> bool:
    if stream.is_resumable and stream.events_at:
        return False
    return any(f.fault.may_cut and f.begin <= stream.end and stream.start <= f.end for f in faults)

"""From the bytes of an answer to its tokens and their times. Runs after the load, not during it.

Each `data:` line is one event, as OpenAI-compatible servers write them; its time is that of the read that completed
the line. A success has a finish reason, a `usage` and the closing `[DONE]`: all else ended early or is no answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from max_ray.benchmark.client import Failure, Recording

_DONE = b"[DONE]"
_MAX_MESSAGE = 300


@dataclass(slots=True)
class Result:
    """One request, parsed. Times are seconds of `perf_counter`; token counts are the server's `usage`.

    times: of the events that carried text (or, where none did, of the one that carried the finish reason).
    last: of the last event with text or finish reason.
    """

    due: float
    start: float
    end: float
    output_len: int
    failure: Failure | None = None
    times: list[float] = field(default_factory=list)
    last: float = 0.0
    num_input: int = 0
    num_output: int = 0
    text: str = ""

    @property
    def ttft(self) -> float:
        return self.times[0] - self.start

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None when there is no second one."""
        return (self.last - self.times[0]) / (self.num_output - 1) if self.num_output > 1 else None

    @property
    def itl(self) -> list[float]:
        """Gaps between events with text; a server that packs tokens together has fewer and longer ones."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]

    @property
    def e2e(self) -> float:
        return self.end - self.start


@dataclass(slots=True)
class _Answer:
    """What the events of one stream have said so far."""

    texts: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    finished: float | None = None
    usage: tuple[int, int] | None = None
    done: bool = False
    failure: Failure | None = None


def parse(recording: Recording) -> Result:
    result = Result(recording.due, recording.start, recording.end, recording.output_len, recording.failure)
    if result.failure is not None:
        return result
    answer = _read_answer(recording)
    result.failure = _verdict(answer)
    result.text = "".join(answer.texts)
    if result.failure is None:
        assert answer.usage is not None
        assert answer.finished is not None
        result.times = answer.times or [answer.finished]
        result.last = max(result.times[-1], answer.finished)
        result.num_input, result.num_output = answer.usage
    return result


def _read_answer(recording: Recording) -> _Answer:
    answer = _Answer()
    for time, payload in data_lines(recording.times, recording.reads):
        if payload == _DONE:
            answer.done = True
            break
        try:
            _take(answer, time, json.loads(payload))
        except (ValueError, TypeError, AttributeError, KeyError):
            answer.failure = Failure("bad_event", payload[:_MAX_MESSAGE].decode(errors="replace"))
        if answer.failure is not None:
            break
    return answer


def data_lines(times: Sequence[float], reads: Sequence[bytes]) -> Iterator[tuple[float, bytes]]:
    """The `data:` lines of a stream, with the time of the read that completed each."""
    rest = b""
    for time, read in zip(times, reads, strict=True):
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield time, line[5:].strip()


def _take(answer: _Answer, time: float, event: dict[str, Any]) -> None:
    if event.get("error"):
        answer.failure = Failure("error_event", json.dumps(event["error"])[:_MAX_MESSAGE])
        return
    if event.get("usage"):
        answer.usage = (int(event["usage"]["prompt_tokens"]), int(event["usage"]["completion_tokens"]))
    for choice in event.get("choices") or ():
        text = _text(choice)
        if text:
            answer.texts.append(text)
            answer.times.append(time)
        if choice.get("finish_reason"):
            answer.finished = time


def _text(choice: dict[str, Any]) -> str:
    """Text of a completion or chat chunk; reasoning counts, under both names that servers use."""
    delta = choice.get("delta") or {}
    found = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
    return str(found or "")


def _verdict(answer: _Answer) -> Failure | None:
    if answer.failure is not None:
        return answer.failure
    if not answer.done or answer.finished is None:
        missing = "[DONE]" if not answer.done else "a finish reason"
        return Failure("truncated", f"The stream ended without {missing}, after {len(answer.texts)} chunks of text.")
    if answer.usage is None:
        return Failure("no_usage", "The server sent no usage although stream_options asked: tokens cannot be counted.")
    return None

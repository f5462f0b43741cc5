"""Recorded bytes to results: event borders, and what counts as a success."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from max_ray.benchmark.client import Failure, Recording
from max_ray.benchmark.stream import data_lines, parse

USAGE = {"prompt_tokens": 3, "completion_tokens": 2}


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(piece: str, finish_reason: str | None = None) -> bytes:
    return event(choices=[{"text": piece, "finish_reason": finish_reason}])


DONE = b"data: [DONE]\n\n"
WHOLE = [text("a"), text("b"), text("", "stop"), event(choices=[], usage=USAGE), DONE]


def recording(reads: list[bytes]) -> Recording:
    times = [1.0 + 0.1 * i for i in range(len(reads))]
    return Recording(0.0, 2, start=0.5, end=3.0, times=times, reads=reads)


def test_a_whole_answer() -> None:
    result = parse(recording(WHOLE))
    assert result.failure is None
    assert (result.text, result.num_input, result.num_output) == ("ab", 3, 2)
    assert result.times == pytest.approx([1.0, 1.1])
    assert result.last == pytest.approx(1.2)  # the finish reason came after the last text
    assert (result.ttft, result.tpot) == (pytest.approx(0.5), pytest.approx(0.2))


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_events_may_be_cut_anywhere(newline: bytes) -> None:
    stream = b": a comment\n\n".join([b"", *WHOLE]).replace(b"\n", newline)
    whole = list(data_lines([0.0], [stream]))
    assert len(whole) == len(WHOLE)
    for cut in range(1, len(stream)):
        assert [line for _, line in data_lines([0.0, 1.0], [stream[:cut], stream[cut:]])] == [line for _, line in whole]
    single = [stream[i : i + 1] for i in range(len(stream))]
    assert parse(recording(single)).text == "ab"


def test_an_event_has_the_time_of_the_read_that_completed_it() -> None:
    stream = b"".join(WHOLE)
    random_cuts = random.Random(0)
    for _ in range(50):
        cuts = [0, *sorted(random_cuts.sample(range(1, len(stream)), 6)), len(stream)]
        reads = [stream[a:b] for a, b in itertools.pairwise(cuts)]
        ends = [stream.index(line) + len(line) + 1 for _, line in data_lines([0.0], [stream])]
        naive = [next(i for i, end in enumerate(cuts[1:]) if end >= line_end) for line_end in ends]
        assert [time for time, _ in data_lines([float(i) for i in range(7)], reads)] == naive


def test_chat_reasoning_and_several_events_a_read() -> None:
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "x"}, {"reasoning": "y"}, {"content": "z"}]
    events = [event(choices=[{"delta": delta}]) for delta in deltas]
    result = parse(recording([b"".join(events), *WHOLE[2:]]))
    assert result.text == "xyz"
    assert result.itl == [0.0, 0.0]


def test_an_answer_without_text_has_its_finish_as_first_token() -> None:
    result = parse(recording([text("", "stop"), event(choices=[], usage=USAGE | {"completion_tokens": 1}), DONE]))
    assert result.failure is None
    assert result.times == [1.0]
    assert (result.tpot, result.itl) == (None, [])


@pytest.mark.parametrize(
    ("reads", "kind"),
    [
        ([], "truncated"),
        (WHOLE[:1], "truncated"),
        (WHOLE[:4], "truncated"),  # all but [DONE]
        (WHOLE[:2] + WHOLE[3:], "truncated"),  # no finish reason
        ([*WHOLE[:4], b"data: [DONE]"], "truncated"),  # its line never ended
        (WHOLE[:3] + WHOLE[4:], "no_usage"),
        ([text("a"), event(error={"message": "no"}), *WHOLE[1:]], "error_event"),
        ([text("a"), b"data: {broken\n\n", *WHOLE[1:]], "bad_event"),
        ([event(choices=[], usage={"prompt_tokens": 1}), *WHOLE], "bad_event"),
        ([b"data: 5\n\n", *WHOLE], "bad_event"),
    ],
)
def test_what_is_no_success(reads: list[bytes], kind: str) -> None:
    result = parse(recording(reads))
    assert result.failure is not None
    assert result.failure.kind == kind
    assert result.num_output == 0


def test_a_failed_recording_stays_failed() -> None:
    broken = recording(WHOLE)
    broken.failure = Failure("reset", "gone")
    assert parse(broken).failure == Failure("reset", "gone")

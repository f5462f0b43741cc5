"""Each parser on outputs in its family's format: what they mean, and that no split of the text changes it."""

from __future__ import annotations

import random
import re

import pytest

from max_ray.output_parsers import REASONING_PARSERS, TOOL_PARSERS
from tests.output_parsers.reading import events_of, parser_of, read
from tests.output_parsers.recordings import ALL, Recording

GREEK = re.compile(r"[\u0370-\u03ff]")
LATE = {name for name, recording in ALL.items() if recording.tools in ("pythonic", "gemma", "functiongemma")}
LATE |= {"hermes: rich, text after", "hermes: arguments in a string", "hermes: no arguments"}
"""Where a call is reported when it is complete."""
recordings = pytest.mark.parametrize("recording", ALL.values(), ids=ALL.keys())


def greek(text: str) -> list[str]:
    return GREEK.findall(text)


@recordings
def test_meaning(recording: Recording) -> None:
    reading = read(events_of(parser_of(recording), [recording.text]))
    assert reading.calls == list(recording.calls)
    assert (reading.content, reading.thought) == (recording.content, recording.thought)
    expected = recording.ids or tuple(f"{name}-{number}" for number, (name, _) in enumerate(recording.calls))
    assert tuple(reading.ids) == expected


@recordings
def test_every_split_in_two(recording: Recording) -> None:
    text = recording.text
    whole = events_of(parser_of(recording), [text])
    for place in range(len(text) + 1):
        assert events_of(parser_of(recording), [text[:place], text[place:]]) == whole, text[:place]


@recordings
def test_random_splits(recording: Recording) -> None:
    text = recording.text
    whole = events_of(parser_of(recording), [text])
    assert events_of(parser_of(recording), text) == whole
    choose = random.Random(recording.name)
    for _ in range(200):
        cuts = sorted(choose.choices(range(len(text) + 1), k=choose.randint(0, len(text))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert events_of(parser_of(recording), pieces) == whole, pieces


@recordings
def test_a_cut_loses_no_text(recording: Recording) -> None:
    """At every place: the letters that came are there, once and in order, and no split matters."""
    for end in range(len(recording.text)):
        text = recording.text[:end]
        reading = read(whole := events_of(parser_of(recording), [text]))
        assert sorted(greek(reading.text)) == sorted(greek(text)), text
        assert events_of(parser_of(recording), text) == whole, text


@pytest.mark.parametrize("name", sorted(set(ALL) - LATE))
def test_something_arrives_before_the_end(name: str) -> None:
    recording = ALL[name]
    parser = parser_of(recording)
    beginning = recording.text[: len(recording.text) * 9 // 10]
    assert any(parser.push(character) for character in beginning)


def test_every_parser_has_recordings() -> None:
    assert {recording.tools for recording in ALL.values()} == {None, *TOOL_PARSERS}
    assert {recording.reasoning for recording in ALL.values()} == {None, *REASONING_PARSERS}

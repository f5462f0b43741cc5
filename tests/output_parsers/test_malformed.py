"""Texts that are no calls, broken ones, and long ones."""

from __future__ import annotations

import random

import pytest

from max_ray.output_parsers import REASONING_PARSERS, TOOL_PARSERS, ParserInput
from max_ray.output_parsers.base import GeneratorParser
from max_ray.output_parsers.reader import MAX_UNDECIDED
from tests.output_parsers.reading import events_of, parser_of, read
from tests.output_parsers.recordings import ALL, TOOLS, Recording

LOOK_ALIKES = {
    "hermes": [
        "a <tool_calls> tag, <tool_call and </tool_call>",
        '<tool_call>get_weather</tool_call> and <tool_call>{"city": 1}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        "x < y <",
    ],
    "qwen3_coder": ["<function> and <function =a> <function=>", "<tool_call>\n{}\n</tool_call>", "<parameter=a>b"],
    "llama3_json": ['{"name": "other", "parameters": {}}', '{"a": {"name": "get_time"}}', "{get_time}", "[1, 2]"],
    "pythonic": ["[other(a=1)]", "[get_time]", "[get_time(1)]", "[get_weather(city=a.b)]", "[]", "get_time (x)"],
    "gemma": ["```python\nget_time()\n```", "```tool_code\nother()\n```", '```json\n{"name": "Ann"}\n```'],
    "mistral": ["[TOOL_CALL] [TOOL_CALLS] none", "[ARGS]{}", "[TOOL_CALLS]name[ARGS]none"],
    "deepseek_v3": ["<\uff5ctool\u2581call\u2581begin\uff5c>x<\uff5ctool\u2581sep\uff5c>none", "<\uff5c"],
    "glm45": ["<tool_call>two words</tool_call>", "<arg_key>a</arg_key>"],
    "kimi_k2": ["<|tool_call_begin|>f<|tool_call_end|>", "<|tool_calls_section_begin|> none"],
    "granite": ["<|tool_call|> []", "<function_call>none"],
    "phi4_mini": ["functools.partial(f)[0]", "functools [1]"],
    "json": ['[{"name": "Ann"}]', '{"name": "Ann", "parameters": 1}', "```json\n[]\n```"],
    "harmony": ["a <|channel b", "to Rome=1", "to=", "<|con"],
    "functiongemma": ["<start_function_call>f{}", "<start_function_call>call:f{a:b}<end_function_call>"],
}
THOUGHTLESS = {
    "think": ["a <think>b</think>", "<thinking>a</thinking>", "</think>", " <thin", "<think"],
    "mistral": ["[THINKING]", "a [THINK]b[/THINK]"],
    "granite": ["Here is my thought", "So: Here is my thought process: a", "<response>a</response>"],
    "harmony": ["<think>a</think>"],
}


@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
def test_what_only_looks_like_a_call_is_content(name: str) -> None:
    for text in LOOK_ALIKES[name]:
        recording = Recording("", text, tools=name)
        for pieces in ([text], list(text)):
            reading = read(events_of(parser_of(recording), pieces))
            assert (reading.content, reading.names) == (text, []), text


@pytest.mark.parametrize("name", sorted(REASONING_PARSERS))
def test_what_only_looks_like_reasoning_is_content(name: str) -> None:
    for text in THOUGHTLESS[name]:
        for pieces in ([text], list(text)):
            reading = read(events_of(parser_of(Recording("", text, reasoning=name)), pieces))
            assert (reading.content, reading.thought) == (text, ""), text


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
def test_random_texts_of_fragments(name: str, seed: int) -> None:
    """Nothing raises, events come in order, and no split matters."""
    choose = random.Random(f"{name}{seed}")
    own = [recording for recording in ALL.values() if recording.tools == name]
    markers = [*TOOL_PARSERS[name].markers, *TOOL_PARSERS[name].__dict__.get("openers", ())]
    words = [
        *markers,
        *markers,
        '"',
        "{",
        "}",
        "[",
        "]",
        "\n",
        " ",
        ",",
        "\\",
        "get_time",
        "'",
        "(",
        ")",
        "=",
        "`",
        "1",
    ]
    for number in range(40):
        if number % 2:
            text = "".join(choose.choices(words, k=choose.randint(1, 30)))
        else:
            recorded = choose.choice(own).text
            place, end = sorted(choose.choices(range(len(recorded) + 1), k=2))
            text = recorded[:place] + choose.choice(words) + recorded[end if number % 4 else place :]
        recording = Recording("", text, tools=name, reasoning=choose.choice([None, *REASONING_PARSERS]))
        whole = events_of(parser_of(recording), [text])
        read(whole)
        assert events_of(parser_of(recording), text) == whole, text
        cut = choose.randint(0, len(text))
        assert events_of(parser_of(recording), [text[:cut], "", text[cut:]]) == whole, text


def made(kind: type[GeneratorParser]) -> GeneratorParser:
    return kind(ParserInput(tools=TOOLS))


@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
def test_little_of_a_long_text_is_kept(name: str) -> None:
    parser = made(TOOL_PARSERS[name])
    for piece in ("word < [ ` {\n" * 20, "    " * 100, "\n"):
        most = 0
        for _ in range(2000):
            parser.push(piece)
            most = max(most, parser.num_kept)
        assert most < 2 * len(piece) + 100


@pytest.mark.parametrize("recording", [r for r in ALL.values() if r.name in ("one", "named", "v3.1", "call")])
def test_little_of_long_arguments_is_kept(recording: Recording) -> None:
    parser = made(TOOL_PARSERS[recording.tools or ""])
    head, found, _ = recording.text.partition("\u0396")
    assert found
    parser.push(head)
    length = 0
    for _ in range(2000):
        events = parser.push("0123456789" * 10)
        length += sum(len(event.text) for event in events if hasattr(event, "text"))
        assert parser.num_kept < 300
    assert length > 190_000


@pytest.mark.parametrize("piece", [1, 100, 10**9])
def test_a_call_that_does_not_show_its_name_is_content(piece: int) -> None:
    text = '<tool_call>{"arguments": {"a": "' + "x" * (2 * MAX_UNDECIDED) + '"}, "name": "get_time"}</tool_call>'
    parser = made(TOOL_PARSERS["hermes"])
    pieces = [text[start : start + piece] for start in range(0, len(text), piece)]
    reading = read(events_of(parser, pieces if piece > 1 else [*pieces[:1000], text[1000:]]))
    assert reading.content == text
    assert parser.num_kept < 2 * MAX_UNDECIDED + 200


def test_deep_nesting_ends_a_call() -> None:
    text = '<tool_call>{"name": "get_time", "arguments": ' + "[" * 100_000
    reading = read(events_of(made(TOOL_PARSERS["hermes"]), [text]))
    assert reading.names == ["get_time"]
    assert len(reading.arguments[0]) + len(reading.content) == 100_000
    for bracket in "[", "{'a':":
        text = f"[get_weather(anything={bracket * 20_000})]"
        assert read(events_of(made(TOOL_PARSERS["pythonic"]), [text])).content == text

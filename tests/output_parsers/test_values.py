"""From tags and Python to JSON, and from a template to its parsers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from max_ray.errors import ConfigError
from max_ray.output_parsers import detect, reasoning_parser_name, tool_parser_name
from max_ray.output_parsers.python_values import LiteralError, python_arguments, python_value
from max_ray.output_parsers.schema_types import as_json
from tests.tokenization import chat_templates


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "integer"}, 5),
        ("5", {"type": "string"}, "5"),
        ("5", {}, 5),
        ("five", {"type": "integer"}, "five"),
        ("5", {"type": "number"}, 5),
        ("5.5", {"type": "number"}, 5.5),
        (" 5\n", {"type": ["integer", "null"]}, 5),
        ("null", {"type": ["string", "null"]}, None),
        ("true", {"type": ["string", "null"]}, "true"),
        ("None", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
        ("True", {"type": "boolean"}, True),
        ("{'a': (1, 'b')}", {"type": "object"}, {"a": [1, "b"]}),
        ("[1,", {"type": "array"}, "[1,"),
        ("7", {"enum": ["7", "8"]}, "7"),
        ("7", {"enum": [7, 8]}, 7),
        ("NaN", {}, "NaN"),
        ("a b", {}, "a b"),
        ('"quoted"', {}, '"quoted"'),
        ("[" * 10_000, {}, "[" * 10_000),
        ("9" * 5000, {}, "9" * 5000),
        ("x", {"oneOf": "wrong"}, "x"),
        ("x", {"type": 3}, "x"),
    ],
)
def test_arguments_by_schema(text: str, schema: dict[str, Any], value: Any) -> None:
    assert json.loads(as_json(text, schema)) == value


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("'a\\'b\\n\\x41\\u00e9\\d'", "a'b\nA\u00e9\\d"),
        ('"""a"b\n"""', 'a"b\n'),
        ("-1_000", -1000),
        ("+.5e1", 5.0),
        ("[1, (2,), {'a': None, 3: true},]", [1, [2], {"a": None, "3": True}]),
        ("'\\ud800'", "\\ud800"),
        ("''", ""),
    ],
)
def test_python_literals(source: str, value: Any) -> None:
    assert python_value(source) == value


@pytest.mark.parametrize(
    "source", ["", "a", "f()", "1 2", "[1", "{1}", "1j", "'a", "__import__('os')", "[" * 100 + "]" * 100, "1e999"]
)
def test_no_python_literals(source: str) -> None:
    with pytest.raises(LiteralError):
        python_value(source)


def test_keyword_arguments() -> None:
    assert python_arguments(" a = 1, b='x',") == {"a": 1, "b": "x"}
    assert python_arguments("") == {}
    for source in ("1", "a", "a=", "a=1 b=2", "**a", "a=1,,"):
        with pytest.raises(LiteralError):
            python_arguments(source)


@pytest.mark.parametrize(
    ("template", "family", "parsers"),
    [
        (chat_templates.QWEN, "Qwen3ForCausalLM", ("hermes", "think")),
        (chat_templates.CHATML, "Qwen2ForCausalLM", ("hermes", None)),
        (chat_templates.CHATML, None, ("json", None)),
        (chat_templates.LLAMA, "LlamaForCausalLM", ("llama3_json", None)),
        (chat_templates.DEEPSEEK, "DeepseekV3ForCausalLM", ("deepseek_v3", "think")),
        (chat_templates.GEMMA, "Gemma3ForCausalLM", ("gemma", None)),
        (chat_templates.MISTRAL, "MistralForCausalLM", ("mistral", None)),
        ("{{ '<|start|>assistant<|channel|>final<|message|>' }}", None, ("harmony", "harmony")),
        ("<tool_call>\n<function=x>\n<parameter=y>", None, ("qwen3_coder", None)),
        ("<tool_call>{{ x }}\n<arg_key></think>", None, ("glm45", "think")),
        ("<|tool_calls_section_begin|><|tool_call_begin|>x<|tool_call_argument_begin|>", None, ("kimi_k2", None)),
        ("[THINK][TOOL_CALLS]x[ARGS]", None, ("mistral", "mistral")),
        ("<|tool|>{{ tools }}<|/tool|>", None, ("phi4_mini", None)),
        ("<|start_of_role|>assistant <|tool_call|> Here is my thought process:", None, ("granite", "granite")),
        ("<|start_of_role|>x<|end_of_role|><tool_call>", "GraniteForCausalLM", ("hermes", None)),
        ("<|header_start|>assistant<|python_start|>", None, ("pythonic", None)),
        ("<start_of_turn><start_function_call>", None, ("functiongemma", None)),
        (None, "Qwen3ForCausalLM", (None, None)),
    ],
)
def test_detection(template: str | None, family: str | None, parsers: tuple[str | None, str | None]) -> None:
    assert detect(template, family) == parsers


def test_names() -> None:
    assert tool_parser_name("deepseek_v31") == "deepseek_v3"
    assert tool_parser_name("none") == "none"
    assert reasoning_parser_name("qwen3") == "think"
    with pytest.raises(ConfigError, match="Did you mean 'hermes'"):
        tool_parser_name("hermse")
    with pytest.raises(ConfigError, match="one of auto, none"):
        reasoning_parser_name("llama")

"""Output parsers by name, and the parser of a request."""

from __future__ import annotations

from collections.abc import Iterable

from max_ray.errors import ConfigError, nearest, quoted
from max_ray.output_parsers.base import ChainedParser, GeneratorParser, OutputParser, ParserInput
from max_ray.output_parsers.harmony import HarmonyParser
from max_ray.output_parsers.json_calls import (
    GraniteParser,
    HermesParser,
    JsonParser,
    Llama3JsonParser,
    Phi4MiniParser,
)
from max_ray.output_parsers.named_calls import DeepSeekParser, KimiK2Parser, MistralParser
from max_ray.output_parsers.pythonic import FunctionGemmaParser, GemmaParser, PythonicParser
from max_ray.output_parsers.reasoning import GraniteReasoningParser, MistralReasoningParser, ThinkParser
from max_ray.output_parsers.xml_calls import Glm45Parser, Qwen3CoderParser

AUTO = "auto"
NONE = "none"

TOOL_PARSERS: dict[str, type[GeneratorParser]] = {
    "deepseek_v3": DeepSeekParser,
    "functiongemma": FunctionGemmaParser,
    "gemma": GemmaParser,
    "glm45": Glm45Parser,
    "granite": GraniteParser,
    "harmony": HarmonyParser,
    "hermes": HermesParser,
    "json": JsonParser,
    "kimi_k2": KimiK2Parser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "phi4_mini": Phi4MiniParser,
    "pythonic": PythonicParser,
    "qwen3_coder": Qwen3CoderParser,
}
"""Parsers of tool calls."""

REASONING_PARSERS: dict[str, type[GeneratorParser]] = {
    "granite": GraniteReasoningParser,
    "harmony": HarmonyParser,
    "mistral": MistralReasoningParser,
    "think": ThinkParser,
}
"""Parsers of reasoning."""

_TOOL_ALIASES = {
    "deepseek_r1": "deepseek_v3",
    "deepseek_v31": "deepseek_v3",
    "glm47": "glm45",
    "granite-20b-fc": "granite",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "openai": "harmony",
    "phi4_mini_json": "phi4_mini",
    "qwen3_xml": "qwen3_coder",
}
_REASONING_ALIASES = {
    **dict.fromkeys(("deepseek_r1", "deepseek_v3", "glm45", "kimi_k2", "qwen3"), "think"),
    "openai_gptoss": "harmony",
}


def tool_parser_name(name: str) -> str:
    """The name of a tool parser: `auto`, `none`, or a key of TOOL_PARSERS.

    Args:
        name: That name, or another server's for the same parser.

    Raises:
        ConfigError: No parser has this name.
    """
    return _resolved(name, TOOL_PARSERS, _TOOL_ALIASES)


def reasoning_parser_name(name: str) -> str:
    """The name of a reasoning parser: `auto`, `none`, or a key of REASONING_PARSERS.

    Args:
        name: That name, or another server's for the same parser.

    Raises:
        ConfigError: No parser has this name.
    """
    return _resolved(name, REASONING_PARSERS, _REASONING_ALIASES)


def create_parser(tool_parser: str | None, reasoning_parser: str | None, given: ParserInput) -> OutputParser | None:
    """The parser of one choice.

    Args:
        tool_parser: Key of TOOL_PARSERS; None where the request has no tools.
        reasoning_parser: Key of REASONING_PARSERS; None where reasoning stays in the content.
        given: What is known of the request.

    Returns:
        The parser, or None where there is nothing to parse.
    """
    reasoning = None if reasoning_parser is None else REASONING_PARSERS[reasoning_parser]
    tools = None if tool_parser is None else TOOL_PARSERS[tool_parser]
    if reasoning is None or tools is None or reasoning is tools:
        kind = tools or reasoning
        return None if kind is None else kind(given)
    return ChainedParser(reasoning(given), tools(given))


def _resolved(name: str, known: Iterable[str], aliases: dict[str, str]) -> str:
    names = [AUTO, NONE, *known]
    resolved = aliases.get(name, name)
    if resolved not in names:
        hint = nearest(name, [*names, *aliases])
        raise ConfigError(f"one of {', '.join(names)}, not {quoted(name)}.{hint}")
    return resolved

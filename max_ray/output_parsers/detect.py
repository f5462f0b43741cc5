"""Finds the output parsers of a model by the markers in its chat template."""

from __future__ import annotations

_TOOL_MARKERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("kimi_k2", ("<|tool_call_argument_begin|>",)),
    ("deepseek_v3", ("<\uff5ctool\u2581call\u2581begin\uff5c>",)),
    ("glm45", ("<arg_key>",)),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("functiongemma", ("<start_function_call>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("phi4_mini", ("functools",)),
    ("phi4_mini", ("<|/tool_call|>",)),
    ("phi4_mini", ("<|/tool|>",)),
    ("granite", ("<|tool_call|>",)),
    ("granite", ("<function_call>",)),
    ("granite", ("<|start_of_role|>", "<tool_call>[")),
    ("hermes", ("<tool_call>",)),
    ("pythonic", ("<|python_start|>",)),
    ("pythonic", ("<|header_start|>",)),
    ("llama3_json", ("<|python_tag|>",)),
    ("llama3_json", ("<|start_header_id|>", "ipython")),
    ("gemma", ("<start_of_turn>",)),
)
"""A parser, and what stands in the templates of its models. The first line that fits counts."""

_REASONING_MARKERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("mistral", ("[THINK]",)),
    ("granite", ("Here is my thought process",)),
    ("granite", ("<|start_of_role|>", "<think>")),
    ("think", ("</think>",)),
    ("think", ("<think>",)),
    ("think", ("\u25c1think\u25b7",)),
)

_TOOLS_OF_FAMILIES = {
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Gemma3ForCausalLM": "gemma",
    "Gemma3ForConditionalGeneration": "gemma",
    "Glm4MoeForCausalLM": "glm45",
    "GptOssForCausalLM": "harmony",
    "GraniteForCausalLM": "granite",
    "GraniteMoeForCausalLM": "granite",
    "Llama4ForCausalLM": "pythonic",
    "Llama4ForConditionalGeneration": "pythonic",
    "LlamaForCausalLM": "llama3_json",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "hermes",
    "Qwen2MoeForCausalLM": "hermes",
    "Qwen3ForCausalLM": "hermes",
    "Qwen3MoeForCausalLM": "hermes",
}
"""Used where a template says nothing, such as one that writes tools in words."""

_REASONING_OF_FAMILIES = {"GptOssForCausalLM": "harmony"}


def detect(chat_template: str | None, architecture: str | None = None) -> tuple[str | None, str | None]:
    """The parsers that fit a model.

    Args:
        chat_template: Its chat template; several are joined. None without one.
        architecture: The class name in its config.json.

    Returns:
        Names of the tool parser and of the reasoning parser. The tool parser is "json" for an unknown template; both
        are None without a template, and the reasoning parser is None where the template knows no reasoning.
    """
    if not chat_template:
        return None, None
    tools = _first(chat_template, _TOOL_MARKERS) or _TOOLS_OF_FAMILIES.get(architecture or "", "json")
    reasoning = _first(chat_template, _REASONING_MARKERS) or _REASONING_OF_FAMILIES.get(architecture or "")
    return tools, reasoning


def _first(template: str, table: tuple[tuple[str, tuple[str, ...]], ...]) -> str | None:
    return next((name for name, markers in table if all(marker in template for marker in markers)), None)

"""Fits a chat request to the served model: its template's options, its tools, and the form of its messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from max_ray.errors import InputError
from max_ray.serve.api.engine import Engine
from max_ray.serve.api.model_parsers import ModelParsers
from max_ray.serve.api.openai import GenerationJob
from max_ray.serve.api.tool_fields import ChatOutput
from max_ray.serve.api.tool_grammar import tool_grammar
from max_ray.serve.api.tool_prompt import with_calls_as_text, with_described_tools
from max_ray.tokenization.chat_template import ChatTemplate

_SWITCHES = ("enable_thinking", "thinking")
"""Names by which templates turn the model's reasoning off."""
_OFF = "none"


def fitted(job: GenerationJob, engine: Engine) -> GenerationJob:
    """The request as the model's chat template takes it. Other requests are given back as they are.

    Args:
        job: The request.
        engine: Serves the model.

    Raises:
        InputError: The model cannot do what the request asks for.
    """
    template = engine.tokenizer.chat_template
    if job.chat is None or template is None:
        return job
    if job.chat.tools and not job.chat.is_forced and engine.parsers.tools is None:
        raise InputError(
            "This server does not tell this model's tool calls from text. It is started with --tool-call-parser for "
            "that; 'tool_choice': 'none' asks for a text.",
            param="tools",
        )
    options = {**job.template_options, **_effort_options(job, template, engine.parsers)}
    messages = job.messages
    facts = template.facts
    if facts.is_known and not (facts.tool_calls and "tool" in facts.roles):
        messages = with_calls_as_text(messages)
    if facts.is_known and not facts.tools and "tools" in options:
        messages = with_described_tools(messages, options.pop("tools"), facts.system != "none")
    fitted_job = replace(job, messages=messages, template_options=options)
    return _with_tool_grammar(fitted_job, job.chat, engine) if job.chat.tools else fitted_job


def _with_tool_grammar(job: GenerationJob, chat: ChatOutput, engine: Engine) -> GenerationJob:
    """The request with its tool parser, and with a grammar where one is needed. Raises InputError where none fits."""
    given = job.sampling.get("structured_output")
    names = engine.tokenizer.special_names
    grammar, parser = tool_grammar(chat, given, job.grammar_field, engine.parsers.tools, names)
    chat = replace(chat, parser=parser)
    if grammar is None:
        return replace(job, chat=chat)
    field = job.grammar_field if given is not None else "tools"
    return replace(job, chat=chat, sampling={**job.sampling, "structured_output": grammar}, grammar_field=field)


def _effort_options(job: GenerationJob, template: ChatTemplate, parsers: ModelParsers) -> dict[str, Any]:
    """Options for `reasoning_effort` and `verbosity`. Raises InputError where the template has nothing of the kind."""
    options: dict[str, Any] = {}
    for name, value in job.efforts.items():
        switch = next((switch for switch in _SWITCHES if switch in template.variables), None)
        is_off = name == "reasoning_effort" and value == _OFF
        if is_off and switch is not None:
            options[switch] = False
        elif name in template.variables:
            options[name] = value
        elif not (is_off and parsers.reasoning is None) and job.default_efforts.get(name) != value:
            hint = " The only value is 'none', without reasoning." if switch and name == "reasoning_effort" else ""
            raise InputError(f"This model's chat template reads no '{name}'. Leave it out.{hint}", param=name)
    return options

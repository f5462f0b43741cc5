"""Fields of a chat request that speak of tools, reasoning and the chat template, and what they come to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from max_ray.errors import InputError, quoted
from max_ray.serve.api.neutral_fields import CACHE_CONTROL
from max_ray.serve.api.request_fields import Neutral, StrictModel, foreign, only
from max_ray.tokenization.chat_template import is_short

MAX_TOOLS = 128
MAX_DOCUMENTS = 1024
MAX_OPTIONS = 64
_SHORT_CHARACTERS = 4096
_NAME = re.compile(r"[\w.\-]{1,128}", re.ASCII)
_OPTION = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)
_OWN_OPTIONS = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
_OPTION_SCHEMA = rf"^(?!(?:{'|'.join(sorted(_OWN_OPTIONS))})$)(?!.*_token$)[A-Za-z_][A-Za-z0-9_]{{0,63}}$"
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


class FunctionSpec(StrictModel):
    """A function that the model may call. `parameters` is a JSON schema."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {"returns": foreign(), "response": foreign()}

    name: str = Field(json_schema_extra={"pattern": f"^(?:{_NAME.pattern})$"})
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("a function's name has 1 to 128 letters, digits, and characters of '_.-'")
        return name

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates read it."""
        described = {} if self.description is None else {"description": self.description}
        function = {"name": self.name, **described, "parameters": self.parameters or dict(_NO_PARAMETERS)}
        return {"type": "function", "function": function}


class ToolSpec(StrictModel):
    """A tool; only functions are known."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {"cache_control": CACHE_CONTROL}

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(StrictModel):
    """The name of a function."""

    name: str


class NamedToolChoice(StrictModel):
    """The one tool that the model has to call."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {"index": only()}

    type: Literal["function"]
    function: NamedFunction


def _choice_tag(choice: Any) -> str:
    return "<word>" if isinstance(choice, str) else "<function>"


@dataclass(frozen=True)
class ChatOutput:
    """How the answer of a chat request is read.

    Args:
        tools: Parameters (JSON schemas) of the functions that may be called, by name; empty without tools.
        strict: Names of the functions whose arguments have to follow their schema.
        choice: "none" (no call), "auto" (the model decides), "required" (a call), or "named" (of the only tool).
        is_parallel: Whether more than one call may be made.
        separates_reasoning: Whether reasoning is told from the content.
        includes_reasoning: Whether reasoning is in the answer.
        continued: The text of the assistant that the answer continues.
        parser: The tool parser, once it is known.
        thinking_budget: Tokens of reasoning after which its end is forced; None for any number.
    """

    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    strict: frozenset[str] = frozenset()
    choice: Literal["none", "auto", "required", "named"] = "none"
    is_parallel: bool = True
    separates_reasoning: bool = True
    includes_reasoning: bool = True
    continued: str = ""
    parser: str | None = None
    thinking_budget: int | None = None

    @property
    def is_forced(self) -> bool:
        """Whether a call has to be made."""
        return self.choice in ("required", "named")


class ToolFields(StrictModel):
    """The fields of `ChatCompletionRequest` for tools, reasoning and the chat template."""

    tools: Annotated[list[ToolSpec], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<word>")]
            | Annotated[NamedToolChoice, Tag("<function>")],
            Discriminator(_choice_tag),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    reasoning_format: Literal["none", "auto", "deepseek"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, json_schema_extra={"maxProperties": MAX_OPTIONS, "propertyNames": {"pattern": _OPTION_SCHEMA}}
    )
    thinking_token_budget: int | None = Field(default=None, ge=-1)
    documents: Annotated[list[dict[str, Any]], Field(max_length=MAX_DOCUMENTS, fail_fast=True)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        if len(options) > MAX_OPTIONS:
            raise ValueError(f"it has {len(options)} variables, more than {MAX_OPTIONS}")
        for name in options:
            if not _OPTION.fullmatch(name) or name in _OWN_OPTIONS or name.endswith("_token"):
                raise ValueError(f"{quoted(name)} is no variable that a request may set")
        return options

    @property
    def is_long(self) -> bool:
        """Whether tools, documents and options take time to work on."""
        tools = [tool.function.parameters for tool in self.tools or ()]
        return not is_short([], {"a": tools, "b": self.documents, "c": self.chat_template_kwargs}, _SHORT_CHARACTERS)

    @property
    def offered_tools(self) -> list[FunctionSpec]:
        """The functions that may be called: all, the named one, or none.

        Raises:
            InputError: `tools` and `tool_choice` contradict each other.
        """
        functions = [tool.function for tool in self.tools or []]
        names = [function.name for function in functions]
        if len(set(names)) < len(names):
            raise InputError("Two tools have the same name: give each its own.", param="tools")
        choice = self.tool_choice
        if isinstance(choice, NamedToolChoice):
            if choice.function.name not in names:
                raise InputError(
                    f"tool_choice names the function {quoted(choice.function.name)}, which is not in tools.",
                    param="tool_choice",
                )
            return [function for function in functions if function.name == choice.function.name]
        if (
            choice == "required" and self.tools is not None and not functions
        ):  # alone, as LlamaIndex sends it, it passes
            raise InputError("tool_choice is 'required', and there are no tools.", param="tool_choice")
        return [] if choice == "none" else functions

    def chat_output(self, continued: str) -> ChatOutput:
        """How the answer is read.

        Args:
            continued: The text of the assistant that the answer continues.
        """
        offered = self.offered_tools
        named = isinstance(self.tool_choice, NamedToolChoice)
        choice: Any = "named" if named else (self.tool_choice or "auto") if offered else "none"
        return ChatOutput(
            tools={function.name: function.parameters or _NO_PARAMETERS for function in offered},
            strict=frozenset(function.name for function in offered if function.strict),
            choice=choice,
            is_parallel=self.parallel_tool_calls is not False,
            separates_reasoning=self.reasoning_format != "none",
            includes_reasoning=self.include_reasoning is not False,
            continued=continued,
            thinking_budget=None if self.thinking_token_budget == -1 else self.thinking_token_budget,
        )

    def template_options(self) -> dict[str, Any]:
        """Variables for the chat template, apart from `reasoning_effort` and `verbosity`.

        Raises:
            InputError: Fields contradict each other.
        """
        if self.continue_final_message and self.add_generation_prompt:
            raise InputError(
                "continue_final_message continues the last message, and add_generation_prompt begins a new one: "
                "give one of them.",
                param="continue_final_message",
            )
        given = {
            "tools": [function.for_template() for function in self.offered_tools] or None,
            "documents": self.documents or None,
            "add_generation_prompt": False if self.continue_final_message else self.add_generation_prompt,
            "continue_final_message": self.continue_final_message or None,
        }
        return {**(self.chat_template_kwargs or {}), **{name: v for name, v in given.items() if v is not None}}

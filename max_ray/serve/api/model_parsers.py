"""The output parsers of the served model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from max_ray.output_parsers import AUTO, NONE, detect
from max_ray.tokenization.tokenizer import TextTokenizer

_FALLBACK = "json"


@dataclass(frozen=True)
class ModelParsers:
    """Names of the parsers.

    Args:
        tools: The parser of tool calls; None where calls are not told from text.
        reasoning: The parser of reasoning; None where it is not told from the content.
    """

    tools: str | None = None
    reasoning: str | None = None

    @classmethod
    def of(
        cls,
        tokenizer: TextTokenizer,
        tool_call_parser: str = AUTO,
        reasoning_parser: str = AUTO,
        architecture: str | None = None,
    ) -> ModelParsers:
        """The parsers that settings name or the chat template suggests.

        A template that describes no tools gets the parser of plain JSON: the server describes the tools then.

        Args:
            tokenizer: Of the model.
            tool_call_parser: The setting.
            reasoning_parser: The setting.
            architecture: The class name in the model's config.json.
        """
        template = tokenizer.chat_template
        tools, reasoning = detect(None if template is None else template.source, architecture)
        if template is not None and template.facts.is_known and not template.facts.tools:
            tools = _FALLBACK
        return cls(_chosen(tool_call_parser, tools), _chosen(reasoning_parser, reasoning))

    def public(self) -> dict[str, Any]:
        """For `GET /v1/models/{id}`."""
        return {"tool_call_parser": self.tools or NONE, "reasoning_parser": self.reasoning or NONE}


def _chosen(setting: str, found: str | None) -> str | None:
    return found if setting == AUTO else None if setting == NONE else setting

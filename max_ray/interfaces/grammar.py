"""GrammarSpec: what a generated text must match, as it travels from a request to the worker that samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Literal

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark", "gbnf", "structural_tag", "reasoning"]
Whitespace = Literal["fixed", "flexible"]


@dataclass(frozen=True)
class GrammarSpec:
    """A grammar in the words of the request. Immutable, hashable and picklable.

    Args:
        kind: The language that `text` is written in.
        text: A JSON schema, a regular expression, a JSON list of texts (choice), a Lark or GBNF grammar, or the JSON
            of structural tags, or of reasoning and what follows it (`structured_output.reasoning`). Empty for
            json_object.
        whitespace: Between the tokens of JSON. `fixed` writes `{"a": 1, "b": 2}` and nothing else, so that most
            punctuation is forced; `flexible` allows any JSON whitespace. It has no meaning for the other kinds.
    """

    kind: GrammarKind
    text: str = ""
    whitespace: Whitespace = "fixed"

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that name the content; equal for equal specs in every process."""
        parts = (self.kind, self.whitespace, self.text)
        return blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()

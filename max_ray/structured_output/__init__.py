"""Structured output: texts that match a JSON schema, a regular expression, a choice or a grammar.

A request carries a `GrammarSpec`. Where it comes in, `GrammarChecker` says whether it can be enforced; where tokens are
sampled, `GrammarCompiler` gives the `GrammarMatcher` of a row, which makes the mask of each step.
"""

from max_ray.structured_output.checker import GrammarChecker
from max_ray.structured_output.compiler import GrammarCompiler
from max_ray.structured_output.grammar_text import grammar_text
from max_ray.structured_output.json_schema import checked_schema
from max_ray.structured_output.matcher import GrammarMatcher
from max_ray.structured_output.reasoning import Reasoning, ReasoningMatcher
from max_ray.structured_output.vocabulary import TokenVocabulary

__all__ = [
    "GrammarChecker",
    "GrammarCompiler",
    "GrammarMatcher",
    "Reasoning",
    "ReasoningMatcher",
    "TokenVocabulary",
    "checked_schema",
    "grammar_text",
]

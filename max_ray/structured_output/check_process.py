"""The process that compiles clients' grammars on trial, under hard limits of processor time and memory.

Compiling cannot be interrupted, and a few lines can ask for more than a machine has (patterns that are intersected
double the work each). So the first to compile a grammar is a process that may be killed. It reads one JSON line a
grammar from stdin and answers with one: null where the grammar is fine, else a sentence.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from typing import Any

import numpy as np

from max_ray.errors import InputError
from max_ray.interfaces.grammar import GrammarSpec
from max_ray.structured_output.compiler import compile_grammar
from max_ray.structured_output.json_schema import subschemas
from max_ray.structured_output.matcher import GrammarMatcher
from max_ray.structured_output.vocabulary import TokenVocabulary

CPU_SECONDS = 1.0
MEMORY_BYTES = 1024**3
_END = 256  # the id of the token that ends a text
_NUM_MASKS = 8


def byte_vocabulary() -> TokenVocabulary:
    """A token for each byte, and one that ends a text, `_END`."""
    return TokenVocabulary([bytes([i]) for i in range(256)] + [b""], _END, lambda text: list(text.encode()))


def problem_of(spec: GrammarSpec) -> str | None:
    """What is wrong with a grammar: it is compiled, and its first masks are made. None where nothing is."""
    try:
        matcher = GrammarMatcher(compile_grammar(_TOKENIZER, spec), [_END], _END + 1)
        _make_masks(matcher)
    except InputError as error:
        return _culprit(spec) or str(error)
    return None


def _make_masks(matcher: GrammarMatcher) -> None:
    """Follows what is forced, to where the grammar first has a choice."""
    for _ in range(_NUM_MASKS):
        matcher.fill_mask(np.zeros(_END // 32 + 1, dtype=np.uint32))
        forced = matcher.forced_tokens()
        if not forced or forced[-1] == _END:
            return
        matcher.advance(forced)


def _culprit(spec: GrammarSpec) -> str | None:
    """The sentence that names the keyword which the grammar library refuses, where it is one of those that it refuses
    for their value. None where it cannot be said."""
    if spec.kind != "json_schema":
        return None
    try:
        schema = json.loads(spec.text)
        definitions = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        for path, part in subschemas(schema):
            for keyword in ("pattern", "multipleOf", "oneOf"):
                if keyword in part and (reason := _refusal({keyword: part[keyword], **definitions})):
                    return f"The JSON schema keyword '{keyword}' at {path} cannot be enforced: {reason}"
    except (InputError, ValueError, TypeError, RecursionError):
        pass  # the first message stands
    return None


def _refusal(schema: dict[str, Any]) -> str | None:
    try:
        compile_grammar(_TOKENIZER, GrammarSpec("json_schema", json.dumps(schema)))
    except InputError as error:
        reason = str(error).removeprefix("The grammar cannot be compiled: ")
        return "its alternatives may overlap." if "oneOf" in reason else reason
    return None


_TOKENIZER = byte_vocabulary().build()


def main() -> None:
    """Serves until stdin ends. A grammar that takes too long or too much memory ends the process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = problem_of(GrammarSpec(*json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

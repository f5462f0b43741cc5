"""Reasoning before an answer: any walk through the masks has the markers, keeps the budget and ends in the grammar."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from max_ray.errors import InputError, StructuredOutputError
from max_ray.interfaces.grammar import GrammarSpec
from max_ray.structured_output import GrammarCompiler, Reasoning, TokenVocabulary, grammar_text
from tests.structured_output.vocabularies import merged_bytes

OPENER, CLOSER = "<think>", "</think>"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
ANSWER = GrammarSpec("json_schema", json.dumps(SCHEMA))


def with_markers(are_tokens: bool) -> TokenVocabulary:
    """Bytes, pieces of some bytes, some of which overrun a closer, and perhaps the markers as tokens without text."""
    plain = merged_bytes()
    tokens = [*plain.tokens[:-2], b"ink>\n", b">x", b"k>", b"a</think>b", b"", b"", b"", b""]
    opener = len(tokens) - 3
    marks = {OPENER: opener, CLOSER: opener + 1} if are_tokens else {}

    def encode(text: str) -> list[int]:
        return [marks[text]] if text in marks else list(text.encode())

    return TokenVocabulary(tokens, len(tokens) - 1, encode)


@pytest.fixture(scope="module", params=[False, True], ids=["bytes", "tokens"])
def vocabulary(request: pytest.FixtureRequest) -> TokenVocabulary:
    return with_markers(request.param)


@pytest.fixture(scope="module")
def compiler(vocabulary: TokenVocabulary) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(lambda: vocabulary)
    yield compiler
    compiler.close()


def allowed(matcher: Any, vocabulary: TokenVocabulary) -> list[int]:
    mask = np.zeros(-(-len(vocabulary.tokens) // 32), dtype=np.uint32)
    matcher.fill_mask(mask)
    flags = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(vocabulary.tokens)]
    return [int(i) for i in np.flatnonzero(flags)]


def ends(vocabulary: TokenVocabulary) -> list[int]:
    assert vocabulary.eos_token_id is not None
    return [vocabulary.eos_token_id]


def text_of(tokens: list[int], vocabulary: TokenVocabulary) -> str:
    names = {vocabulary.encode(marker)[0]: marker for marker in (OPENER, CLOSER) if len(vocabulary.encode(marker)) == 1}
    parts = [names[i].encode() if i in names else vocabulary.tokens[i] for i in tokens]
    return b"".join(parts).decode(errors="replace")


def walk(matcher: Any, vocabulary: TokenVocabulary, rng: random.Random) -> list[int]:
    """Draws until the end, now and then a piece of a marker."""
    tokens: list[int] = []
    pieces = [*CLOSER.encode(), *(i for marker in (OPENER, CLOSER) for i in vocabulary.encode(marker))]
    wanted: list[int] = []
    for _ in range(400):
        choices = allowed(matcher, vocabulary)
        if choices == ends(vocabulary) or (ends(vocabulary)[0] in choices and rng.random() < 0.2):
            return tokens
        if not wanted and rng.random() < 0.1:
            wanted = list(vocabulary.encode(CLOSER))
        token = wanted.pop(0) if wanted else rng.choice(pieces if rng.random() < 0.3 else choices)
        if token not in choices:
            token, wanted = rng.choice(choices), []
        if token != ends(vocabulary)[0]:
            tokens.append(token)
            matcher.advance([token])
    return tokens


def num_inside(tokens: list[int], vocabulary: TokenVocabulary, is_open: bool) -> int | None:
    """Tokens of reasoning before the closer; None where there was none."""
    opener, closer = vocabulary.encode(OPENER), vocabulary.encode(CLOSER)
    start = 0 if is_open else len(opener)
    if tokens[:start] != ([] if is_open else opener):
        return None
    place = next(i for i in range(start, len(tokens) + 1) if CLOSER in text_of(tokens[start:i], vocabulary))
    own = place - len(closer) - start if tokens[place - len(closer) : place] == closer else place - 1 - start
    return max(0, own)


@pytest.mark.parametrize("budget", [None, 0, 1, 7, 40])
@pytest.mark.parametrize("is_open", [True, False])
def test_an_answer_of_the_grammar_behind_it(
    compiler: GrammarCompiler, vocabulary: TokenVocabulary, budget: int | None, is_open: bool
) -> None:
    spec = Reasoning(OPENER, CLOSER, is_open, budget, ANSWER).spec()
    num_ended = num_reasoned = 0
    for seed in range(40):
        tokens = walk(compiler.matcher(spec, ends(vocabulary), []), vocabulary, random.Random(seed))
        if len(tokens) >= 400:
            continue
        num_ended += 1
        text = text_of(tokens, vocabulary)
        inside = num_inside(tokens, vocabulary, is_open)
        jsonschema.validate(json.loads(text.split(CLOSER, 1)[1] if inside is not None else text), SCHEMA)
        num_reasoned += inside is not None
        assert inside is None or budget is None or inside <= budget
    assert num_ended >= 30
    assert num_reasoned >= (num_ended if is_open else 1)


@pytest.mark.parametrize("answer", [ANSWER, None])
@pytest.mark.parametrize("is_open", [True, False])
def test_rebuilt_at_any_point_it_is_the_same(
    compiler: GrammarCompiler, vocabulary: TokenVocabulary, answer: GrammarSpec | None, is_open: bool
) -> None:
    spec = Reasoning(OPENER, CLOSER, is_open, 5, answer).spec()
    start = [] if is_open else vocabulary.encode(OPENER)
    matcher = compiler.matcher(spec, ends(vocabulary), start)
    tokens = start + walk(matcher, vocabulary, random.Random(1))
    straight = compiler.matcher(spec, ends(vocabulary), [])
    for cut in range(len(tokens) + 1):
        rebuilt = compiler.matcher(spec, ends(vocabulary), tokens[:cut])
        assert allowed(rebuilt, vocabulary) == allowed(straight, vocabulary)
        assert rebuilt.forced_tokens() == straight.forced_tokens()
        assert (rebuilt.may_end, rebuilt.is_done) == (straight.may_end, straight.is_done)
        straight.advance(tokens[cut : cut + 1])


def test_a_budget_of_free_text(compiler: GrammarCompiler, vocabulary: TokenVocabulary) -> None:
    """The closer is forced, and nothing else is."""
    matcher = compiler.matcher(Reasoning(OPENER, CLOSER, False, 3).spec(), ends(vocabulary), [])
    everything = list(range(len(vocabulary.tokens)))
    for token in [10, *vocabulary.encode(OPENER), *b"abc"]:
        assert allowed(matcher, vocabulary) == everything
        matcher.advance([token])
    for token in vocabulary.encode(CLOSER):
        assert allowed(matcher, vocabulary) == [token]
        assert not matcher.may_end
        matcher.advance([token])
    assert allowed(matcher, vocabulary) == everything
    matcher.advance(list(b"<think>again, without any limit"))
    assert allowed(matcher, vocabulary) == everything
    plain = compiler.matcher(Reasoning(OPENER, CLOSER, False, 0).spec(), ends(vocabulary), list(b"<thin air"))
    assert allowed(plain, vocabulary) == everything


def test_tokens_that_the_budget_forbids(compiler: GrammarCompiler, vocabulary: TokenVocabulary) -> None:
    spec = Reasoning(OPENER, CLOSER, True, 1).spec()
    with pytest.raises(StructuredOutputError, match="budget"):
        compiler.matcher(spec, ends(vocabulary), list(b"ab"))
    assert Reasoning.of(spec) == Reasoning(OPENER, CLOSER, True, 1)
    with pytest.raises(InputError, match="no grammar"):
        grammar_text(spec)

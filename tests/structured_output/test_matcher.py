"""Matchers: their state is a function of the tokens, whatever the vocabulary and however they came to it."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from max_ray.errors import ConfigError, StructuredOutputError
from max_ray.interfaces.grammar import GrammarSpec
from max_ray.structured_output import GrammarCompiler, TokenVocabulary
from max_ray.structured_output import compiler as compiler_module
from max_ray.structured_output import matcher as matcher_module
from max_ray.structured_output.check_process import byte_vocabulary
from tests.structured_output.corpus import ENFORCED
from tests.structured_output.vocabularies import merged_bytes
from tests.structured_output.walks import allowed_tokens, random_walk

SOME_SCHEMAS = ["person", "pydantic", "tree", "pattern and length", "format date", "oneOf by key", "keys to escape"]


@pytest.fixture(scope="module", params=[byte_vocabulary, merged_bytes], ids=["bytes", "merged"])
def vocabulary(request: pytest.FixtureRequest) -> TokenVocabulary:
    make: Callable[[], TokenVocabulary] = request.param
    return make()


@pytest.fixture(scope="module")
def compiler(vocabulary: TokenVocabulary) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(lambda: vocabulary)
    yield compiler
    compiler.close()


def schema_spec(schema: Any) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(schema))


def text_of(tokens: list[int], vocabulary: TokenVocabulary) -> bytes:
    return b"".join(vocabulary.tokens[token] for token in tokens)


def ends_of(vocabulary: TokenVocabulary) -> list[int]:
    assert vocabulary.eos_token_id is not None
    return [vocabulary.eos_token_id]


@pytest.mark.parametrize("name", SOME_SCHEMAS)
def test_rebuilt_at_any_point_it_is_the_same(name: str, compiler: GrammarCompiler, vocabulary: TokenVocabulary) -> None:
    spec, ends, rng = schema_spec(ENFORCED[name]), ends_of(vocabulary), random.Random(name)
    tokens, _ = random_walk(compiler.matcher(spec, ends, []), vocabulary, rng, 120)
    straight = compiler.matcher(spec, ends, [])
    for cut in range(len(tokens) + 1):
        rebuilt = compiler.matcher(spec, ends, tokens[:cut])
        assert allowed_tokens(rebuilt, len(vocabulary.tokens)) == allowed_tokens(straight, len(vocabulary.tokens))
        assert (rebuilt.may_end, rebuilt.is_done) == (straight.may_end, straight.is_done)
        straight.advance(tokens[cut : cut + 1])


@pytest.mark.parametrize("name", SOME_SCHEMAS)
def test_texts_of_tokens_of_several_bytes_are_valid(
    name: str, compiler: GrammarCompiler, vocabulary: TokenVocabulary
) -> None:
    rng, num_ended = random.Random(name), 0
    for _ in range(20):
        matcher = compiler.matcher(schema_spec(ENFORCED[name]), ends_of(vocabulary), [])
        tokens, ended = random_walk(matcher, vocabulary, rng)
        if ended:
            jsonschema.validate(json.loads(text_of(tokens, vocabulary)), ENFORCED[name])
        num_ended += ended
    assert num_ended >= 5


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        (GrammarSpec("regex", "[a-c]{2,5}x?"), "[a-c]{2,5}x?"),
        (GrammarSpec("regex", r"\d+\.\d{2}"), r"\d+\.\d{2}"),
        (GrammarSpec("regex", "^yes|no$"), "yes|no"),
        (GrammarSpec("regex", "a/b\n(c|//d|\\/)"), "a/b\n(c|//d|/)"),
        (GrammarSpec("regex", "(größer|日本)!"), "(größer|日本)!"),
        (GrammarSpec("choice", '["yes", "no", "no way", "\\"q\\"", "日本", "😀"]'), 'yes|no|no way|"q"|日本|😀'),
        (
            GrammarSpec("choice", '["a/b", "c\\\\d", "new\\nline", "<tag>", "%json {}"]'),
            r"a/b|c\\d|new\nline|<tag>|%json \{\}",
        ),
        (GrammarSpec("lark", 'start: "a" b+\nb: /[0-9]/ | "<x>" // no <token>\n'), "a([0-9]|<x>)+"),
        (GrammarSpec("lark", 'start: INT ("," INT)*\n%import common.INT'), r"\d+(,\d+)*"),
        (GrammarSpec("gbnf", 'root ::= "a" [0-9]+ ("b" | "c")?'), "a[0-9]+[bc]?"),
        (GrammarSpec("lark", 'start: "v=" %json {"type": "integer", "minimum": 0}'), r"v=\d+"),
        (GrammarSpec("json_object"), r"\{.*\}"),
    ],
)
def test_other_grammars(
    spec: GrammarSpec, pattern: str, compiler: GrammarCompiler, vocabulary: TokenVocabulary
) -> None:
    rng, seen = random.Random(spec.text), set()
    for _ in range(30):
        tokens, ended = random_walk(compiler.matcher(spec, ends_of(vocabulary), []), vocabulary, rng)
        if ended:
            text = text_of(tokens, vocabulary).decode()
            assert re.fullmatch(pattern, text, re.DOTALL), text
            seen.add(text)
    assert len(seen) >= 2


def test_structural_tags(compiler: GrammarCompiler, vocabulary: TokenVocabulary) -> None:
    structure = {"begin": "<f=add>", "schema": ENFORCED["properties"], "end": "</f>"}
    spec = GrammarSpec("structural_tag", json.dumps({"structures": [structure], "triggers": ["<f="]}))
    ends = ends_of(vocabulary)

    def after(text: str) -> Any:
        return compiler.matcher(spec, ends, list(text.encode()))

    assert after("free text, and {braces}").may_end
    assert not after("free <f=").may_end
    assert not after('free <f=add>{"a": 1, "b": true}').may_end
    assert after('free <f=add>{"a": 1, "b": true}</f> and more').may_end
    for wrong in ("x <f=sub>", '<f=add>{"a": true', "<f=add></f>"):
        with pytest.raises(StructuredOutputError):
            after(wrong)


def test_stop_ids_are_allowed_exactly_where_the_text_may_end(
    compiler: GrammarCompiler, vocabulary: TokenVocabulary
) -> None:
    """All of them, and none where the grammar itself has their bytes."""
    spec, stops = GrammarSpec("regex", "ab?c?"), [*ends_of(vocabulary), ord("b"), 300]
    matcher = compiler.matcher(spec, stops, [])
    assert set(allowed_tokens(matcher, len(vocabulary.tokens))).isdisjoint(stops)
    matcher.advance([ord("a")])
    assert {stop for stop in stops if stop < len(vocabulary.tokens)} <= set(
        allowed_tokens(matcher, len(vocabulary.tokens))
    )
    matcher.advance([ord("b")])  # a stop token ends the text: the grammar does not see it
    assert matcher.tokens == [ord("a")]


def test_tokens_outside_of_the_grammar_are_an_error(compiler: GrammarCompiler, vocabulary: TokenVocabulary) -> None:
    with pytest.raises(StructuredOutputError, match="does not"):
        compiler.matcher(GrammarSpec("regex", "ab"), ends_of(vocabulary), list(b"ax"))


def test_ids_without_a_text_are_never_allowed(compiler: GrammarCompiler, vocabulary: TokenVocabulary) -> None:
    matcher = compiler.matcher(GrammarSpec("regex", r"(?s:.)*"), ends_of(vocabulary), [])
    allowed = set(allowed_tokens(matcher, len(vocabulary.tokens)))
    assert allowed & set(ends_of(vocabulary))
    assert not {i for i in allowed - set(ends_of(vocabulary)) if not vocabulary.tokens[i]}
    assert 0xFF not in allowed  # the library's own mark
    assert {ord("a"), ord("{"), ord("\n")} <= allowed


def test_a_matcher_goes_on_or_is_made_anew(compiler: GrammarCompiler, vocabulary: TokenVocabulary) -> None:
    spec, ends = GrammarSpec("regex", "[a-z]*"), ends_of(vocabulary)
    first = compiler.matcher(spec, ends, list(b"ab"), "request")
    assert compiler.matcher(spec, ends, list(b"abcd"), "request") is first
    assert first.tokens == list(b"abcd")
    other = compiler.matcher(spec, ends, list(b"abx"), "request")
    assert other is not first
    assert other.tokens == list(b"abx")
    assert compiler.matcher(GrammarSpec("regex", "[a-z]+"), ends, list(b"abx"), "request") is not other


def test_a_grammar_is_compiled_once(compiler: GrammarCompiler) -> None:
    spec = GrammarSpec("regex", "once")
    assert compiler.start(spec) is compiler.start(GrammarSpec("regex", "once"))


def test_few_grammars_are_remembered(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "MAX_COMPILED", 3)
    futures = [compiler.start(GrammarSpec("regex", f"few{i}")) for i in range(5)]
    assert compiler.start(GrammarSpec("regex", "few4")) is futures[4]
    assert compiler.start(GrammarSpec("regex", "few0")) is not futures[0]


def test_masks_that_stay_slow_end_the_request(
    compiler: GrammarCompiler, vocabulary: TokenVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matcher_module, "SLOW_MASK_SECONDS", -1.0)
    matcher = compiler.matcher(GrammarSpec("regex", "[a-z]*"), ends_of(vocabulary), [])
    mask = np.zeros((len(vocabulary.tokens) + 31) // 32, dtype=np.uint32)
    for _ in range(matcher_module.MAX_SLOW_MASKS):
        matcher.fill_mask(mask)
    with pytest.raises(StructuredOutputError, match="too complex"):
        matcher.fill_mask(mask)


def test_a_vocabulary_that_cannot_write_the_grammar_is_an_error() -> None:
    vocabulary = TokenVocabulary([b"a", b"b", b""], 2, lambda text: [])
    compiler = GrammarCompiler(lambda: vocabulary)
    with pytest.raises(StructuredOutputError, match="no token"):
        allowed_tokens(compiler.matcher(GrammarSpec("regex", "xyz"), [2], []), 3)
    compiler.close()


def test_a_model_without_an_end_token_has_no_structured_output() -> None:
    with pytest.raises(ConfigError, match="ends a text"):
        TokenVocabulary([b"a"], None, lambda text: [])
    compiler = GrammarCompiler(lambda: TokenVocabulary([b"a"], None, lambda text: []))
    with pytest.raises(StructuredOutputError, match="ends a text"):
        compiler.matcher(GrammarSpec("regex", "a"), [], [])
    compiler.close()


@pytest.mark.parametrize("at_once", [True, False])
def test_the_tokens_are_read_once_at_once_or_with_the_first_grammar(at_once: bool) -> None:
    read: list[int] = []

    def load() -> TokenVocabulary:
        read.append(1)
        return byte_vocabulary()

    compiler = GrammarCompiler(load, starts_at_once=at_once)
    time.sleep(0.2)
    assert len(read) == at_once
    futures = [compiler.start(GrammarSpec("regex", text)) for text in ("a", "b", "ab", "ba")]  # more than threads
    for future in futures:
        future.result(timeout=30)
    assert allowed_tokens(compiler.matcher(GrammarSpec("regex", "ab"), [256], [ord("a")]), 257) == [ord("b")]
    assert read == [1]
    compiler.close()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (GrammarSpec("lark", 'start: "a" <|im_end|>'), "special token"),
        (GrammarSpec("lark", 'start: "a" <[0-99]>'), "special token"),
        (GrammarSpec("lark", '%llguidance {"no_forcing": true}\nstart: "a"'), "directive"),
        (GrammarSpec("lark", 'start: t "b"\nt[suffix="]", stop="x"]: /a*/'), "'stop'"),
        (GrammarSpec("lark", "start: t\nt[temperature=0.1]: /a*/"), "'temperature'"),
        (GrammarSpec("lark", 'start: %json {"x-guidance": {"lenient": true}, "not": {}}'), "x-guidance"),
        (GrammarSpec("lark", "start: %json {"), "JSON schema"),
        (GrammarSpec("lark", '{"grammars": [{"json_schema": {"x-guidance": {}}}]}'), "compiled"),
        (GrammarSpec("lark", "begin: /a/"), "compiled"),
        (GrammarSpec("gbnf", "root ::= (("), "GBNF"),
        (GrammarSpec("regex", "a("), "compiled"),
        (GrammarSpec("choice", "[]"), "1 to"),
        (GrammarSpec("choice", '["a", ""]'), "not empty"),
        (GrammarSpec("choice", '"a"'), "list"),
        (GrammarSpec("structural_tag", "{}"), "structures"),
        (GrammarSpec("structural_tag", '{"format": {}}'), "no other shape"),
        (
            GrammarSpec(
                "structural_tag", '{"structures": [{"begin": "a", "schema": {}, "end": ""}], "triggers": ["b"]}'
            ),
            "none of the triggers",
        ),
        (
            GrammarSpec(
                "structural_tag", '{"structures": [{"begin": "a", "schema": {"not": 1}, "end": ""}], "triggers": ["a"]}'
            ),
            "'not' at structures",
        ),
    ],
)
def test_what_cannot_be_enforced_is_an_error(spec: GrammarSpec, message: str, compiler: GrammarCompiler) -> None:
    with pytest.raises(StructuredOutputError, match=message):
        compiler.matcher(spec, [], [])

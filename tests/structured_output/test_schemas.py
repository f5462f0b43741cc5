"""JSON schemas: what is enforced holds in every text of the grammar, and what is not is refused by name."""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from max_ray.errors import InputError, StructuredOutputError
from max_ray.interfaces.grammar import GrammarSpec
from max_ray.structured_output import GrammarChecker, GrammarCompiler
from max_ray.structured_output.check_process import byte_vocabulary
from tests.structured_output.corpus import ENFORCED, REFUSED
from tests.structured_output.walks import random_walk

VOCABULARY = byte_vocabulary()
END = VOCABULARY.eos_token_id
assert END is not None
FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER


@FORMATS.checks("date-time", raises=ValueError)
def _is_date_time(value: object) -> bool:
    return not isinstance(value, str) or bool(datetime.datetime.fromisoformat(value))


@FORMATS.checks("time", raises=ValueError)
def _is_time(value: object) -> bool:
    return not isinstance(value, str) or bool(datetime.time.fromisoformat(value))


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(byte_vocabulary)
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    checker = GrammarChecker()
    yield checker
    checker.close()


def spec_of(schema: Any, whitespace: Any = "fixed") -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(schema), whitespace)


def test_the_corpus_is_large_enough() -> None:
    assert len(ENFORCED) >= 100
    assert len(REFUSED) >= 60


@pytest.mark.parametrize("name", ENFORCED)
def test_every_text_of_the_grammar_is_valid(name: str, compiler: GrammarCompiler, checker: GrammarChecker) -> None:
    """Random texts; those that end validate, and enough of them do end."""
    schema = ENFORCED[name]
    spec = spec_of(schema)
    checker.check(spec)
    validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
    rng, num_ended = random.Random(name), 0
    for number in range(20):
        matcher = compiler.matcher(spec if number % 2 else spec_of(schema, "flexible"), [END], [])
        tokens, ended = random_walk(matcher, VOCABULARY, rng)
        if ended:
            validator.validate(json.loads(bytes(tokens)))
            num_ended += 1
    assert num_ended >= 10


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused_by_name(name: str, checker: GrammarChecker) -> None:
    keyword, schema = REFUSED[name]
    with pytest.raises(InputError) as caught:
        checker.check(spec_of(schema), param="response_format")
    assert f"'{keyword}'" in str(caught.value)
    assert "$" in str(caught.value)
    assert caught.value.param == "response_format"


@pytest.mark.parametrize(
    ("date", "is_date"),
    [
        ("2024-02-29", True),
        ("2023-02-29", False),
        ("1900-02-29", False),
        ("2000-02-29", True),
        ("0004-02-29", True),
        ("0000-01-01", False),
        ("0001-12-31", True),
        ("2024-04-31", False),
        ("2024-13-01", False),
        ("2024-00-10", False),
        ("24-01-01", False),
    ],
)
def test_dates_are_those_of_the_calendar(date: str, is_date: bool, compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(spec_of({"type": "string", "format": "date"}), [END], [])
    if is_date:
        matcher.advance(list(json.dumps(date).encode()))
        assert matcher.is_done
        return
    with pytest.raises(StructuredOutputError):
        matcher.advance(list(json.dumps(date).encode()))


def test_a_schema_that_costs_too_much_is_refused_and_the_next_one_is_checked(checker: GrammarChecker) -> None:
    """Intersected patterns double the work each; the process that compiles them is ended."""
    bomb = {"type": "string", "allOf": [{"pattern": f".*[a-c]{{{i}}}.*"} for i in range(5, 30)]}
    with pytest.raises(InputError, match="too complex"):
        checker.check(spec_of(bomb))
    with pytest.raises(InputError, match="too complex"):
        checker.check(spec_of(bomb))
    checker.check(spec_of({"type": "string", "maxLength": 17}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be an object or a boolean"),
        ('{"minimum": NaN}', "not valid JSON"),
        ('{"properties": []}', "must be an object"),
        ('{"anyOf": {}}', "must be a list"),
        ('{"required": "a"}', "must be a list"),
        ('{"type": "strin"}', "strin"),
        ('{"$ref": "#/$defs/no"}', "cannot be"),
        ("[" * 100_000, "not valid JSON"),
        ('{"items":' * 70 + "{}" + "}" * 70, "levels deep"),
        (json.dumps({"anyOf": [{"const": i} for i in range(5000)]}), "subschemas"),
        ('{"const": "' + "a" * 300_000 + '"}', "more than"),
        ('{"pattern": "\\ud800"}', "surrogate|cannot be"),
        ('{"const": "\ud800"}', "Unicode"),
        ("false", "cannot be compiled"),
    ],
)
def test_malformed_schemas_are_refused(text: str, message: str, checker: GrammarChecker) -> None:
    with pytest.raises(InputError, match=message):
        checker.check(GrammarSpec("json_schema", text))


def test_a_path_leads_to_the_keyword(checker: GrammarChecker) -> None:
    schema = {"properties": {"a": {"items": {"anyOf": [{}, {"type": "object", "properties": {"b": {"not": {}}}}]}}}}
    with pytest.raises(InputError, match=r"\$\.properties\.a\.items\.anyOf\[1\]\.properties\.b"):
        checker.check(spec_of(schema))

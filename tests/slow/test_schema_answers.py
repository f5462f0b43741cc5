"""What SmolLM2 writes under the schemas of the corpus, in this process and without Ray.

    SMOLLM2_GGUF=SmolLM2-135M-Instruct.Q4_1.gguf python -m pytest -m slow -s tests/slow/test_schema_answers.py

20 answers to a schema at temperature 1, of 256 tokens at most. One that ends with `stop` validates, formats included;
one that ends with `length` is a text that the grammar can still go on from.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from max_ray.interfaces import (
    GenerationStatus,
    GrammarSpec,
    RequestID,
    SamplingParams,
    TextContext,
    TextGenerationInputs,
    TokenBuffer,
)
from max_ray.pipelines import PIPELINE_REGISTRY, PipelineConfig
from max_ray.pipelines.text_generation import TextGenerationPipeline
from max_ray.pipelines.vocabulary import token_vocabulary
from max_ray.structured_output import GrammarCompiler
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.slow.peer import smollm2
from tests.structured_output.corpus import ENFORCED
from tests.structured_output.test_schemas import FORMATS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
NUM_ANSWERS = 20
MAX_TOKENS = 256
NUM_STEPS = 32
VOCAB_SIZE = 49152
_BOUNDED_FORMATS = {"date", "time", "date-time", "ipv4", "ipv6", "uuid"}


class Model:
    """SmolLM2, its tokenizer, and a compiler of grammars apart from the engine's."""

    def __init__(self, path: Path) -> None:
        config = PipelineConfig(
            model_path=str(path), devices="cpu", num_threads=1, max_length=1024, max_batch_size=NUM_ANSWERS
        )
        self.pipeline: TextGenerationPipeline = PIPELINE_REGISTRY.retrieve(config)[1]
        self.tokenizer = TextTokenizer(path, max_length=1024)
        self.eos = frozenset(self.tokenizer.eos_token_ids)
        self.compiler = GrammarCompiler(lambda: token_vocabulary(self.tokenizer, VOCAB_SIZE))

    def answers(self, schema: Any, num_answers: int, max_tokens: int = MAX_TOKENS) -> list[TextContext]:
        """Finished contexts."""
        spec = GrammarSpec("json_schema", json.dumps(schema))
        ask = f"Answer with JSON of this schema: {spec.text[:300]}"
        text = self.tokenizer.render_chat([{"role": "user", "content": ask}])
        prompt = self.tokenizer.encode_text(text, add_special_tokens=False).tolist()
        contexts = [self._context(prompt, spec, seed, max_tokens) for seed in range(num_answers)]
        while not all(context.is_done for context in contexts):
            self.pipeline.execute(TextGenerationInputs(batches=[contexts], num_steps=NUM_STEPS))
        for context in contexts:
            self.pipeline.release(context.request_id)
        return contexts

    def _context(self, prompt: list[int], spec: GrammarSpec, seed: int, max_tokens: int) -> TextContext:
        params = SamplingParams(temperature=1.0, seed=seed, max_new_tokens=max_tokens, structured_output=spec)
        return TextContext(
            request_id=RequestID(),
            tokens=TokenBuffer(prompt),
            max_length=1024,
            eos_token_ids=self.eos,
            sampling_params=params,
        )

    def text(self, context: TextContext) -> str:
        return self.tokenizer.decode_ids(context.tokens.generated.tolist(), skip_special_tokens=True)

    def check(self, context: TextContext, schema: Any) -> bool:
        """Whether the answer ended with `stop`."""
        spec = context.sampling_params.structured_output
        assert spec is not None
        generated = context.tokens.generated.tolist()
        if context.status is GenerationStatus.END_OF_SEQUENCE:
            validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
            validator.validate(json.loads(self.text(context)))
            return True
        assert context.status is GenerationStatus.MAXIMUM_LENGTH
        assert len(generated) == MAX_TOKENS
        self.compiler.matcher(spec, self.eos, generated)  # raises where they are no prefix
        return False


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    given = os.environ.get("SMOLLM2_GGUF")
    model = Model(Path(given) if given else smollm2())
    yield model
    model.compiler.close()


@cache
def ends() -> Counter[tuple[bool, bool]]:
    """How many answers there were so far, by whether the schema is bounded and whether they ended with `stop`."""
    return Counter()


@pytest.mark.parametrize("name", ENFORCED)
def test_answers_validate(name: str, model: Model) -> None:
    schema = ENFORCED[name]
    stopped = [model.check(context, schema) for context in model.answers(schema, NUM_ANSWERS)]
    ends().update((is_bounded(schema), one) for one in stopped)
    print(f"{name}: {sum(stopped)} of {NUM_ANSWERS} end, bounded: {is_bounded(schema)}")


def test_answers_to_bounded_schemas_end() -> None:
    """After the others."""
    num_stopped, num_cut = ends()[(True, True)], ends()[(True, False)]
    if not num_stopped + num_cut:
        pytest.skip("counts the answers of the tests before it, and none of them has run")
    print(f"bounded: {num_stopped} end, {num_cut} are cut; all: {dict(ends())}")
    assert num_stopped >= 0.8 * (num_stopped + num_cut)


def test_keys_take_few_steps(model: Model) -> None:
    """Ten required keys: at most 60 % as many forward steps as tokens. Alone: in a batch a step is of all rows."""
    names = ("given_name", "family_name", "street", "city", "country", "occupation", "employer", "language")
    fields: dict[str, Any] = {name: {"type": "string", "maxLength": 8} for name in names}
    fields |= {"is_active": {"type": "boolean"}, "age": {"type": "integer", "minimum": 0, "maximum": 120}}
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    runner, num_tokens = model.pipeline.executor.runners[0], 0  # type: ignore[attr-defined]
    before = runner.forward_calls
    for _ in range(5):
        (context,) = model.answers(schema, 1)
        assert model.check(context, schema)
        num_tokens += context.tokens.generated_length
    num_steps = runner.forward_calls - before
    print(f"ten keys: {num_steps} steps for {num_tokens} tokens ({num_steps / num_tokens:.0%})")
    assert num_steps <= 0.6 * num_tokens


def is_bounded(schema: Any) -> bool:
    """Whether all its texts are short for sure. Keywords that this does not know make it unbounded."""
    if not isinstance(schema, dict) or "$ref" in schema:
        return False
    if "const" in schema or "enum" in schema:
        return True
    branches = schema.get("anyOf") or schema.get("oneOf")
    if branches:
        return all(is_bounded(branch) for branch in branches)
    kinds = schema.get("type")
    return bool(kinds) and all(_is_bounded_as(kind, schema) for kind in ([kinds] if isinstance(kinds, str) else kinds))


def _is_bounded_as(kind: str, schema: dict[str, Any]) -> bool:
    if kind in ("boolean", "null"):
        return True
    if kind == "string":
        return schema.get("maxLength", 1000) <= 32 or schema.get("format") in _BOUNDED_FORMATS
    if kind == "integer":
        lowest, highest = (schema.keys() & {f"{side}imum", f"exclusive{side.title()}imum"} for side in ("min", "max"))
        return bool(lowest and highest)
    if kind == "array":
        items = [*schema.get("prefixItems", []), schema.get("items", {})]
        return schema.get("maxItems", 100) <= 8 and all(is_bounded(item) for item in items)
    is_closed = schema.get("additionalProperties") is False and "patternProperties" not in schema
    return kind == "object" and is_closed and all(map(is_bounded, schema.get("properties", {}).values()))

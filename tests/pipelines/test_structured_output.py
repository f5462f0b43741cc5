"""Structured output through the pipeline and the loop: outputs match, whatever shares the batch or interrupts it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import jsonschema
import pytest

from max_ray.errors import InputError, StructuredOutputError
from max_ray.interfaces import GenerationStatus, GrammarSpec, LogitControls, SamplingParams, TextContext
from max_ray.kv_cache import LocalKVCacheClient, PagedKVCacheManager
from max_ray.pipelines.text_generation import TextGenerationPipeline
from max_ray.pipelines.vocabulary import token_vocabulary
from max_ray.scheduler import GenerationLoop, SchedulerLimits
from max_ray.structured_output import matcher as matcher_module
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.pipelines.conftest import VOCAB_SIZE, Lab, make_context, random_prompt, run_to_end

EOS = 2
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "date": {"type": "string", "format": "date"},
    },
    "required": ["name", "age", "tags", "date"],
    "additionalProperties": False,
}
SPECS = [
    GrammarSpec("json_schema", json.dumps(SCHEMA)),
    GrammarSpec("json_schema", json.dumps(SCHEMA), "flexible"),
    GrammarSpec("regex", r"[a-z]{3}-[0-9]{2}"),
    GrammarSpec("choice", '["yes", "no", "perhaps"]'),
    GrammarSpec("gbnf", 'root ::= "<" [a-c]+ ">"'),
]


@pytest.fixture
def tokenizer(lab: Lab) -> TextTokenizer:
    return TextTokenizer(lab.model_path, max_length=256)


def constrained(spec: GrammarSpec, seed: int = 0, length: int = 9, **params: Any) -> TextContext:
    options = {"temperature": 1.0, "seed": seed, "max_new_tokens": 160, "structured_output": spec, **params}
    return make_context(random_prompt(length, seed), eos=[EOS], **options)


def free(seed: int = 0) -> TextContext:
    return make_context(random_prompt(7, seed), temperature=1.0, seed=seed, max_new_tokens=40)


def text_of(context: TextContext, tokenizer: TextTokenizer) -> str:
    return tokenizer.decode_ids(context.tokens.generated.tolist(), skip_special_tokens=True)


def check(context: TextContext, tokenizer: TextTokenizer) -> bool:
    """Whether the text ended; then it must match."""
    spec, text = context.sampling_params.structured_output, text_of(context, tokenizer)
    assert spec is not None
    if context.status is GenerationStatus.MAXIMUM_LENGTH:
        return False
    assert context.status is GenerationStatus.END_OF_SEQUENCE
    if spec.kind == "json_schema":
        jsonschema.validate(json.loads(text), json.loads(spec.text), format_checker=jsonschema.FormatChecker())
    elif spec.kind == "choice":
        assert text in json.loads(spec.text)
    else:
        assert re.fullmatch(spec.text if spec.kind == "regex" else "<[a-c]+>", text)
    return True


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.whitespace}")
def test_outputs_match(lab: Lab, tokenizer: TextTokenizer, spec: GrammarSpec) -> None:
    contexts = [constrained(spec, seed) for seed in range(12)]
    run_to_end(lab.pipeline(), contexts)
    assert sum([check(context, tokenizer) for context in contexts]) >= 4
    assert len({text_of(context, tokenizer) for context in contexts}) >= 2


@pytest.mark.parametrize("num_steps", [1, 3, 32])
def test_a_mixed_batch_equals_each_alone_to_the_bit(lab: Lab, tokenizer: TextTokenizer, num_steps: int) -> None:
    def all_contexts() -> list[TextContext]:
        return [*(constrained(spec, i) for i, spec in enumerate(SPECS)), free(1), free(2)]

    together = all_contexts()
    run_to_end(lab.pipeline(), together, num_steps)
    for context, alone in zip(together, all_contexts(), strict=True):
        run_to_end(lab.pipeline(), [alone], 8)
        assert context.tokens.all.tolist() == alone.tokens.all.tolist()
    for context in together[: len(SPECS)]:
        check(context, tokenizer)


def test_with_penalties_filters_and_greedy_rows(lab: Lab, tokenizer: TextTokenizer) -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.5, "min_p": 0.01},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
    ]
    contexts = [constrained(SPECS[2], seed, **kind) for seed, kind in enumerate(kinds)]
    run_to_end(lab.pipeline(), contexts)
    assert all(check(context, tokenizer) for context in contexts)


CONTROLS = [
    LogitControls(typical_p=0.4),
    LogitControls(xtc_probability=0.7, xtc_threshold=0.02),
    LogitControls(dry_multiplier=2.0, dry_allowed_length=1),
    LogitControls(bad_words=((100,), (101, 102), (9,)), logit_bias=((103, 5.0),)),
]


def test_logit_controls_and_a_grammar(lab: Lab, tokenizer: TextTokenizer) -> None:
    """The token is the same drawn among the few that the grammar leaves and, for a report, from all."""

    def all_contexts() -> list[TextContext]:
        return [constrained(SPECS[2], i, logit_controls=controls) for i, controls in enumerate(CONTROLS)]

    together, reported = all_contexts(), all_contexts()
    for context in reported:
        context.log_probabilities = 1
    run_to_end(lab.pipeline(), [*together, free(1)], 8)
    run_to_end(lab.pipeline(), reported, 8)
    for context, same, alone in zip(together, reported, all_contexts(), strict=True):
        run_to_end(lab.pipeline(), [alone], 1)
        assert context.tokens.all.tolist() == alone.tokens.all.tolist() == same.tokens.all.tolist()
        assert check(context, tokenizer)


def test_bans_that_leave_a_grammar_nothing(lab: Lab, tokenizer: TextTokenizer) -> None:
    """The grammar has the last word where all its tokens are banned; the other rows go on."""
    banned = LogitControls(bad_words=tuple((token,) for token in range(VOCAB_SIZE)))
    contexts = [
        constrained(SPECS[2], 1, logit_controls=banned),
        constrained(SPECS[2], 1, logit_controls=banned, temperature=0.0),
        constrained(SPECS[2], 1, logit_controls=LogitControls(allowed_token_ids=(9,))),
        free(1),
    ]
    run_to_end(lab.pipeline(), contexts)
    alone = free(1)
    run_to_end(lab.pipeline(), [alone])
    assert all(check(context, tokenizer) for context in contexts[:3])
    assert contexts[3].tokens.all.tolist() == alone.tokens.all.tolist()


async def test_logit_controls_after_preemption(lab: Lab) -> None:
    """A cache too small for all: what the controls need is rebuilt from the text."""
    kinds = [*CONTROLS, LogitControls(repeat_last_n=5)]

    def all_contexts() -> list[TextContext]:
        options = {"temperature": 0.9, "max_new_tokens": 60, "repetition_penalty": 1.1}
        return [
            make_context(random_prompt(9, i), seed=i, logit_controls=controls, **options)
            for i, controls in enumerate(kinds)
        ]

    async with serving(lab.pipeline(page_size=4, max_batch_size=4), num_blocks=40) as loop:
        answers = await asyncio.gather(*(_generate(loop, context) for context in all_contexts()))
        assert loop.stats.preemptions > 0
    for answer, alone in zip(answers, all_contexts(), strict=True):
        run_to_end(lab.pipeline(), [alone])
        assert answer == alone.tokens.generated.tolist()


def test_log_probabilities_are_those_of_the_masked_logits(lab: Lab) -> None:
    context = constrained(GrammarSpec("regex", "abc"), seed=3)
    context.log_probabilities = 2
    (output,) = run_to_end(lab.pipeline(), [context])
    assert output.log_probabilities is not None
    assert [entry.token_id for entry in output.log_probabilities] == output.tokens
    assert [entry.log_probability for entry in output.log_probabilities] == [0.0] * 4  # nothing else could be said


def test_a_text_of_exactly_max_tokens_is_cut(lab: Lab, tokenizer: TextTokenizer) -> None:
    context = constrained(GrammarSpec("regex", "[a-z]{40}"), max_new_tokens=10)
    run_to_end(lab.pipeline(), [context])
    assert context.status is GenerationStatus.MAXIMUM_LENGTH
    assert re.fullmatch("[a-z]{10}", text_of(context, tokenizer))


def test_stop_token_ids_are_allowed_where_the_grammar_may_end(lab: Lab, tokenizer: TextTokenizer) -> None:
    """Of two ids that end the text, one is drawn, and only at an end."""
    ends = []
    for seed in range(8):
        context = constrained(GrammarSpec("regex", "(ab){1,20}"), seed, stop_token_ids=(270,))
        run_to_end(lab.pipeline(), [context])
        *text, end = context.tokens.generated.tolist()
        assert re.fullmatch("(ab){1,20}", tokenizer.decode_ids(text))
        ends.append(end)
    assert set(ends) <= {EOS, 270}


def test_a_failing_grammar_ends_its_row_alone(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be compiled, and one that becomes too slow."""
    bad = constrained(GrammarSpec("regex", "a("))
    good, other = constrained(SPECS[2], 1), free(1)
    outputs = run_to_end(lab.pipeline(), [bad, good, other])
    assert bad.status is GenerationStatus.FAILED
    assert "compiled" in (outputs[0].error or "")
    assert outputs[0].tokens == []
    assert good.status is GenerationStatus.END_OF_SEQUENCE
    assert len(outputs[2].tokens) == 40

    monkeypatch.setattr(matcher_module, "SLOW_MASK_SECONDS", -1.0)
    slow = constrained(GrammarSpec("regex", "[a-z]{60}"))
    (output,) = run_to_end(lab.pipeline(), [slow])
    assert "too complex" in (output.error or "")
    assert 0 < len(output.tokens) <= matcher_module.MAX_SLOW_MASKS


def test_two_ranks_equal_one_and_a_failing_row_ends_on_both(lab: Lab, tokenizer: TextTokenizer) -> None:
    def all_contexts() -> list[TextContext]:
        return [
            *(constrained(spec, i) for i, spec in enumerate(SPECS)),
            constrained(GrammarSpec("regex", "a(")),
            free(1),
        ]

    one, two = all_contexts(), all_contexts()
    run_to_end(lab.pipeline(), one)
    run_to_end(lab.pipeline(tensor_parallel_size=2), two)
    assert [c.tokens.all.tolist() for c in one] == [c.tokens.all.tolist() for c in two]
    assert [c.status for c in one] == [c.status for c in two]
    assert two[len(SPECS)].status is GenerationStatus.FAILED


def forward_calls(lab: Lab) -> int:
    return int(lab.pipeline().executor.runners[0].forward_calls)  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_rows", [1, 5])
def test_forced_tokens_take_no_step_each(lab: Lab, tokenizer: TextTokenizer, num_rows: int) -> None:
    """Ten required keys: their names come in one step each. With log probabilities every token has its own."""
    keys = {f"key_{i}": {"type": "boolean"} for i in range(10)}
    schema = {"type": "object", "properties": keys, "required": list(keys), "additionalProperties": False}
    spec = GrammarSpec("json_schema", json.dumps(schema))
    contexts = [constrained(spec, seed, max_new_tokens=240) for seed in range(num_rows)]
    one_by_one = [constrained(spec, seed, max_new_tokens=240) for seed in range(num_rows)]
    for context in one_by_one:
        context.log_probabilities = 0
    before = forward_calls(lab)
    run_to_end(lab.pipeline(), contexts)
    num_steps = forward_calls(lab) - before
    run_to_end(lab.pipeline(), one_by_one)
    assert [c.tokens.all.tolist() for c in contexts] == [c.tokens.all.tolist() for c in one_by_one]
    for context in contexts:
        assert json.loads(text_of(context, tokenizer)).keys() == keys.keys()
    num_tokens = max(context.tokens.generated_length for context in contexts)
    assert num_tokens > 150
    assert num_steps <= 0.5 * num_tokens
    assert forward_calls(lab) - before - num_steps >= num_tokens


def test_forced_tokens_stay_within_the_limit(lab: Lab, tokenizer: TextTokenizer) -> None:
    for max_new in range(1, 16):
        context = constrained(GrammarSpec("regex", "[ab]the same text[ab]"), max_new_tokens=max_new)
        run_to_end(lab.pipeline(), [context], num_steps=5)
        assert context.tokens.generated_length == max_new
        text = text_of(context, tokenizer)
        assert text[1:14] == "the same text"[: len(text) - 1]


@asynccontextmanager
async def serving(pipeline: TextGenerationPipeline, num_blocks: int) -> AsyncIterator[GenerationLoop]:
    manager = PagedKVCacheManager(pipeline.kv_manager.params, num_blocks)
    loop = GenerationLoop(pipeline, LocalKVCacheClient(manager), SchedulerLimits(4, 12, 20, 8))
    task = asyncio.create_task(loop.run())
    yield loop
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _generate(loop: GenerationLoop, context: TextContext) -> list[int]:
    return [token async for output in loop.submit(context) for token in output.tokens]


async def test_after_preemption_it_is_the_same_text(lab: Lab, tokenizer: TextTokenizer) -> None:
    """A cache too small for all: requests lose their blocks and are computed again; the grammar goes on."""
    contexts = [constrained(SPECS[0], seed, max_new_tokens=90) for seed in range(4)]
    async with serving(lab.pipeline(page_size=4, max_batch_size=4), num_blocks=50) as loop:
        answers = await asyncio.gather(*(_generate(loop, context) for context in contexts))
        assert loop.stats.preemptions > 0
    for seed, answer in enumerate(answers):
        alone = constrained(SPECS[0], seed, max_new_tokens=90)
        run_to_end(lab.pipeline(), [alone])
        assert answer == alone.tokens.generated.tolist()
        check(alone, tokenizer)


async def test_the_loop_raises_the_error_of_the_grammar(lab: Lab) -> None:
    async with serving(lab.pipeline(page_size=4, max_batch_size=4), num_blocks=60) as loop:
        bad, good = constrained(GrammarSpec("regex", "a(")), constrained(SPECS[2])
        failed, text = await asyncio.gather(_generate(loop, bad), _generate(loop, good), return_exceptions=True)
        assert isinstance(failed, StructuredOutputError)
        assert isinstance(text, list)
        assert loop.stats.running == 0


@pytest.mark.parametrize("name", ["ignore_eos", "min_new_tokens"])
def test_the_grammar_says_where_the_text_ends(name: str) -> None:
    with pytest.raises(InputError) as caught:
        SamplingParams(structured_output=SPECS[0], **{name: True if name == "ignore_eos" else 3})
    assert caught.value.param == name


def test_a_default_of_min_tokens_does_not_count() -> None:
    given = {"structured_output": SPECS[0]}
    params = SamplingParams.from_input_and_generation_config(given, {"min_new_tokens": 5})
    assert params.min_new_tokens == 0


def test_the_vocabulary_is_that_of_the_detokenizer(tokenizer: TextTokenizer) -> None:
    vocabulary = token_vocabulary(tokenizer, VOCAB_SIZE)
    assert len(vocabulary.tokens) == VOCAB_SIZE
    assert vocabulary.eos_token_id == EOS
    assert [vocabulary.tokens[i] for i in (0, 1, 2, 3, 4, 261, 271)] == [b""] * 7
    assert sorted(vocabulary.tokens[5:261]) == [bytes([i]) for i in range(256)]


@pytest.fixture(autouse=True)
def _clean(lab: Lab) -> Iterator[None]:
    yield
    lab.pipeline().kv_manager.release_all()

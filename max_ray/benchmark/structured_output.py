"""What structured output costs: masks, steps, and tokens a second with a schema and without, by turns.

    python -m max_ray.benchmark.structured_output --model-path SmolLM2-135M-Instruct.Q4_1.gguf

Runs the pipeline in this process. All times but those of grammars are processor time of the whole process, so that a
busy machine changes them little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from statistics import median
from typing import Any

from max_ray.interfaces import (
    GenerationStatus,
    GrammarSpec,
    RequestID,
    TextContext,
    TextGenerationInputs,
    TextGenerationRequest,
)
from max_ray.pipelines import PIPELINE_REGISTRY, PipelineConfig
from max_ray.structured_output import GrammarChecker

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email", "maxLength": 40},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
    },
    "required": ["name", "age", "email", "tags"],
    "additionalProperties": False,
}
_NAMES = ("is_open", "is_new", "is_large", "is_old", "is_near", "is_far", "is_safe", "is_cheap", "is_clean", "is_free")
TEN_KEYS: dict[str, Any] = {
    "type": "object",
    "properties": {name: {"type": "boolean"} for name in _NAMES},
    "required": list(_NAMES),
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 50}


class Bench:
    """A pipeline in this process, and what is asked of it."""

    def __init__(self, model_path: str, rows: int) -> None:
        config = PipelineConfig(
            model_path=model_path, devices="cpu", max_length=1024, max_batch_size=rows, enable_prefix_caching=False
        )
        self.tokenizer: Any
        self._pipeline: Any
        self.tokenizer, self._pipeline = PIPELINE_REGISTRY.retrieve(config)
        self._rows = rows

    def contexts(self, schema: Any, rows: int, max_tokens: int) -> list[TextContext]:
        """Requests at temperature 1; without a schema they do not end before `max_tokens`."""
        sampling: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": max_tokens}
        sampling |= {"ignore_eos": True} if schema is None else {"structured_output": spec_of(schema)}
        return [self._context({**sampling, "seed": seed}) for seed in range(rows)]

    def _context(self, sampling: dict[str, Any]) -> TextContext:
        messages = [{"role": "user", "content": f"Describe a person or a place as JSON: number {sampling['seed']}."}]
        request = TextGenerationRequest(RequestID(), messages=messages, sampling_params=sampling)
        context: TextContext = asyncio.run(self.tokenizer.new_context(request))
        return context

    def run(self, contexts: list[TextContext]) -> tuple[float, int]:
        """(seconds of processor time, forward passes) until all are done."""
        runner = self._pipeline.executor.runners[0]
        before, start = runner.forward_calls, time.process_time()
        while active := [context for context in contexts if not context.is_done]:
            self._pipeline.execute(TextGenerationInputs(batches=[active], num_steps=32))
        seconds = time.process_time() - start
        for context in contexts:
            self._pipeline.release(context.request_id)
        return seconds, runner.forward_calls - before


def spec_of(schema: Any) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(schema))


def ends(bench: Bench, rows: int) -> None:
    """How many texts of a bounded schema end by themselves, and the steps of a schema of ten required keys."""
    contexts = bench.contexts(PERSON, rows, 256)
    bench.run(contexts)
    num_ended = sum(context.status is GenerationStatus.END_OF_SEQUENCE for context in contexts)
    print(f"bounded schema: {num_ended} of {rows} texts end with stop within 256 tokens")
    (context,) = bench.contexts(TEN_KEYS, 1, 256)
    _, steps = bench.run([context])
    tokens = context.tokens.generated_length
    print(f"ten required keys: {steps} steps for {tokens} tokens ({steps / tokens:.0%})")


def speed(bench: Bench, rows: int, rounds: int, tokens: int) -> None:
    """Tokens a second of processor time, by turns."""
    ratios = []
    for _ in range(rounds):
        rates = []
        for schema in (None, PEOPLE):
            contexts = bench.contexts(schema, rows, tokens)
            seconds, _ = bench.run(contexts)
            rates.append(sum(context.tokens.generated_length for context in contexts) / seconds)
        ratios.append(rates[1] / rates[0])
        print(
            f"  without {rates[0]:.1f}, with a schema {rates[1]:.1f} tokens a second, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"{rows} rows, with a schema over without: median {median(ratios):.3f} of {rounds}")


def checks(count: int = 20) -> None:
    """Wall time of checking new schemas, as a replica does."""
    checker = GrammarChecker()
    times = []
    for number in range(count + 1):
        start = time.perf_counter()
        checker.check(spec_of({**PERSON, "title": str(number)}))
        times.append((time.perf_counter() - start) * 1000)
    print(f"check of a new schema: the first {times[0]:.0f} ms, then median {median(times[1:]):.1f} ms")
    checker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    checks()
    bench = Bench(arguments.model_path, arguments.rows)
    for schema in (None, PEOPLE):  # kernels are compiled, steps recorded
        bench.run(bench.contexts(schema, arguments.rows, 8))
    ends(bench, arguments.rows)
    speed(bench, arguments.rows, arguments.rounds, arguments.tokens)


if __name__ == "__main__":
    main()

"""Families with caches, layers and experts of other kinds through the whole library: registry, plan, tensor-parallel
ranks, prefix cache, a token a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from max_ray.conformance.reference import huggingface_reference
from max_ray.pipelines import PIPELINE_REGISTRY, PipelineConfig
from tests.architectures.families import find_tiny, make_tiny
from tests.checkpoints import make_tokenizer
from tests.pipelines.conftest import VOCAB_SIZE, make_context, random_prompt, run_to_end

NUM_TOKENS = 12


@pytest.mark.parametrize("name", ["Gemma 3", "Qwen3 MoE", "DeepSeek V3", "gpt-oss"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_greedy_tokens_with_a_prefix_hit(tmp_path: Path, name: str, num_ranks: int) -> None:
    model = find_tiny(name)
    path = make_tiny(replace(model, overrides={**model.overrides, "vocab_size": VOCAB_SIZE}), tmp_path)
    make_tokenizer().save_pretrained(path)
    config = PipelineConfig(
        model_path=str(path),
        devices="cpu",
        num_threads=1,
        kv_cache_page_size=4,
        tensor_parallel_size=num_ranks,
        quantization_encoding="float32",
    )
    _, pipeline = PIPELINE_REGISTRY.retrieve(config)
    first = random_prompt(21)
    prompts = [first, [*first[:16], 7, 8, 9]]
    contexts = [make_context(prompt, max_length=128, max_new_tokens=NUM_TOKENS) for prompt in prompts]
    outputs = [run_to_end(pipeline, [context], num_steps=5)[0] for context in contexts]
    assert [output.num_cached_tokens for output in outputs] == [0, 16]
    reference = huggingface_reference(path)
    for prompt, output in zip(prompts, outputs, strict=True):
        (logits,) = reference([[*prompt, *output.tokens]])
        assert len(output.tokens) == NUM_TOKENS
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == output.tokens

"""Prompts with images through the pipeline: chunks, rows that leave a run at different steps, preemption; decode steps
launched one by one (experts) and replayed (dense); 1 and 2 ranks. The tokens are those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from architectures.qwen3_vl import qwen3_vl_arch
from architectures.qwen3_vl_moe import qwen3_vl_moe_arch
from max_ray.interfaces import RequestID, RunRow, SamplingParams, TextContext, TokenBuffer
from max_ray.pipelines import PIPELINE_REGISTRY, PipelineConfig
from tests.architectures.vision import (
    DENSE,
    SPARSE,
    Prompt,
    VisionFamily,
    VisionReference,
    make_served_vision,
    picture,
    prompt,
)
from tests.pipelines.conftest import run_to_end

PROMPTS = [
    prompt(5, picture(40, 24), 7, seed=2),
    prompt(9, seed=1),
    prompt(3, picture(40, 24, seed=1), 2, picture(17, 70), 6, seed=3),
    prompt(picture(8, 24), seed=4),
]
NUM_NEW = [3, 12, 7, 10]


def served(each: Prompt, placeholder: int) -> Prompt:
    """The same for a model with another placeholder token."""
    tokens = list(each.tokens)
    for image in each.images:
        tokens[image.start : image.end] = [placeholder] * image.num_tokens
    return Prompt(tokens, each.pictures, each.images)


def context_of(each: Prompt, num_new: int) -> TextContext:
    return TextContext(
        request_id=RequestID(),
        tokens=TokenBuffer(each.tokens),
        max_length=200,
        sampling_params=SamplingParams(temperature=0.0, max_new_tokens=num_new),
        images=each.images,
    )


@pytest.mark.parametrize(("family", "num_ranks"), [(DENSE, 1), (DENSE, 2), (SPARSE, 1)], ids=["dense", "2", "experts"])
def test_rows_with_and_without_images(tmp_path: Path, family: VisionFamily, num_ranks: int) -> None:
    torch.set_num_threads(1)
    for record in (qwen3_vl_arch, qwen3_vl_moe_arch):
        PIPELINE_REGISTRY.register(record)
    path = make_served_vision(family, tmp_path / "model")
    config = PipelineConfig(model_path=str(path), num_threads=1, devices="cpu", tensor_parallel_size=num_ranks)
    tokenizer, pipeline = PIPELINE_REGISTRY.retrieve(config)
    prompts = [served(each, tokenizer.image_token_id) for each in PROMPTS]
    reference = VisionReference(path, family)
    expected = [reference.greedy(each, n) for each, n in zip(prompts, NUM_NEW, strict=True)]
    for chunk in (None, 6):
        contexts = [context_of(each, n) for each, n in zip(prompts, NUM_NEW, strict=True)]
        for context in contexts if chunk else ():
            context.chunk(chunk or 1)
        outputs = run_to_end(pipeline, contexts, num_steps=5)
        assert [output.tokens for output in outputs] == expected
        pipeline.kv_manager.assert_invariants()
    again = [context_of(each, n) for each, n in zip(prompts, NUM_NEW, strict=True)]
    run_to_end(pipeline, again)
    assert [context.cached_prefix_length for context in again] == [16, 0, 32, 0]


def test_a_row_carries_only_what_its_tokens_need() -> None:
    """Images of which a part is active; afterwards none, and the offset of the positions."""
    each = PROMPTS[2]
    first, second = each.images
    context = context_of(each, 4)
    context.chunk(first.start)
    assert RunRow.from_context(context, 1).images == ()
    seen = []
    for count in (1, 2, first.end - first.start - 3, 1, second.start - first.end + 4, 1):
        context.advance()
        context.chunk(count)
        row = RunRow.from_context(context, 1)
        seen.append((row.images, row.position_offset, row.next_position_offset))
    change = first.position_change
    assert change == 5 - 15
    assert seen == [
        ((first,), 0, 0),
        ((first,), 0, 0),
        ((first,), 0, change),
        ((), change, change),
        ((second,), change, change),
        ((second,), change, change),
    ]
    context.advance()
    context.advance()
    context.update(7)
    row = RunRow.from_context(context, 1)
    assert (row.images, row.position_offset) == ((), change + second.position_change)
    context.reset()
    assert RunRow.from_context(context, 1).images == (first, second)

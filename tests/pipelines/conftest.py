"""One tiny Llama for all end-to-end tests of the library, its Hugging Face reference, and pipelines by page size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from max_ray.interfaces import (
    RequestID,
    SamplingParams,
    TextContext,
    TextGenerationInputs,
    TextGenerationOutput,
    TokenBuffer,
)
from max_ray.pipelines import PIPELINE_REGISTRY, PipelineConfig
from max_ray.pipelines.text_generation import TextGenerationPipeline
from tests.checkpoints import load_reference, make_llama

VOCAB_SIZE = 272


class Lab:
    """The checkpoint, the reference, and every pipeline asked for so far."""

    def __init__(self, folder: Path) -> None:
        # heads of 16: the C++ attention takes these; the families' own tests have heads of 8, the reference's
        self.model_path = make_llama(folder, vocab_size=VOCAB_SIZE, head_dim=16)
        self.reference = load_reference(self.model_path)
        self._pipelines: dict[tuple[tuple[str, Any], ...], TextGenerationPipeline] = {}
        self._greedy: dict[tuple[int, ...], list[int]] = {}

    def config(self, **settings: Any) -> PipelineConfig:
        return PipelineConfig(model_path=str(self.model_path), num_threads=1, devices="cpu", **settings)

    def pipeline(self, page_size: int = 16, **settings: Any) -> TextGenerationPipeline:
        """A pipeline with an empty cache; the same settings give the same one."""
        key = (("kv_cache_page_size", page_size), *sorted(settings.items()))
        if key not in self._pipelines:
            self._pipelines[key] = PIPELINE_REGISTRY.retrieve(self.config(**dict(key)))[1]
        pipeline = self._pipelines[key]
        pipeline.kv_manager.release_all()
        pipeline.kv_manager.reset_prefix_cache()
        return pipeline

    def check_caches(self) -> None:
        for pipeline in self._pipelines.values():
            pipeline.kv_manager.assert_invariants()

    def greedy(self, prompt: Sequence[int], num_tokens: int = 10) -> list[int]:
        """What Hugging Face generates greedily, end of sequence ignored."""
        known = self._greedy.get(tuple(prompt), [])
        if len(known) < num_tokens:
            ids = torch.tensor([list(prompt)])
            config = self.reference.generation_config
            with torch.inference_mode():
                output = self.reference.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=num_tokens,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=config.pad_token_id,
                )
            known = self._greedy[tuple(prompt)] = output[0, len(prompt) :].tolist()
        return known[:num_tokens]


@pytest.fixture(scope="session")
def shared_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    torch.set_num_threads(1)
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def lab(shared_lab: Lab) -> Iterator[Lab]:
    """The block accounting of every pipeline is checked after each test."""
    yield shared_lab
    shared_lab.check_caches()


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Ids past the special ones, the same for the same arguments."""
    return np.random.default_rng([seed, length]).integers(5, VOCAB_SIZE, length).tolist()


def make_context(
    prompt: Sequence[int],
    *,
    max_length: int = 256,
    eos: Sequence[int] = (),
    logprobs: int | None = None,
    echo: bool = False,
    **params: Any,
) -> TextContext:
    """Greedy and without an end of sequence unless said otherwise."""
    return TextContext(
        request_id=RequestID(),
        tokens=TokenBuffer(prompt),
        max_length=max_length,
        eos_token_ids=frozenset(eos),
        sampling_params=SamplingParams(**{"temperature": 0.0, "seed": 0, **params}),
        log_probabilities=logprobs,
        log_probabilities_echo=echo,
    )


def execute(
    pipeline: TextGenerationPipeline, contexts: Sequence[TextContext], num_steps: int = 1
) -> list[TextGenerationOutput]:
    """One batch; outputs in the order of `contexts`."""
    outputs = pipeline.execute(TextGenerationInputs(batches=[list(contexts)], num_steps=num_steps))
    return [outputs[context.request_id] for context in contexts]


def run_to_end(
    pipeline: TextGenerationPipeline, contexts: Sequence[TextContext], num_steps: int = 8
) -> list[TextGenerationOutput]:
    """Runs until all are done, then releases them; the outputs of all batches merged."""
    merged = execute(pipeline, contexts, num_steps)
    while not all(context.is_done for context in contexts):
        for total, output in zip(merged, execute(pipeline, contexts, num_steps), strict=True):
            total.merge(output)
    for context in contexts:
        pipeline.release(context.request_id)
    return merged

"""Every family against Hugging Face on tiny random checkpoints: 1 and 2 ranks; paged, chunked, prefix-hit runs and
greedy tokens in float32, and the same runs in bfloat16 (on 2 ranks with the slow tests)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from max_ray.conformance.reference import huggingface_reference
from max_ray.conformance.suite import Suite
from max_ray.interfaces import SupportedEncoding
from max_ray.registry import PIPELINE_REGISTRY
from tests.architectures.families import TINY_MODELS, TinyModel, find_tiny, make_tiny

SuiteOf = Callable[[TinyModel], Suite]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def suite_of(tmp_path_factory: pytest.TempPathFactory) -> SuiteOf:
    """A tiny model's checkpoint and reference, made once."""

    def make(name: str) -> Suite:
        model = find_tiny(name)
        path: Path = make_tiny(model, tmp_path_factory.mktemp("tiny"))
        architecture = PIPELINE_REGISTRY.retrieve_architecture(model.class_name)
        return Suite(architecture, path, huggingface_reference(path), model.routed)

    cached = cache(make)
    return lambda model: cached(model.name)


def assert_conforms(suite: Suite, num_ranks: int, encoding: SupportedEncoding) -> None:
    assert [verdict for verdict in suite.run(num_ranks, encoding) if not verdict.passed] == []


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("model", TINY_MODELS, ids=lambda m: m.name)
def test_float32(suite_of: SuiteOf, model: TinyModel, num_ranks: int) -> None:
    assert_conforms(suite_of(model), num_ranks, SupportedEncoding.float32)


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", TINY_MODELS, ids=lambda m: m.name)
def test_bfloat16(suite_of: SuiteOf, model: TinyModel, num_ranks: int) -> None:
    assert_conforms(suite_of(model), num_ranks, SupportedEncoding.bfloat16)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3 MoE", "DeepSeek V3"])
def test_experts_spread_over_the_ranks(suite_of: SuiteOf, name: str) -> None:
    suite = replace(suite_of(find_tiny(name)), expert_parallel=True)
    assert_conforms(suite, 2, SupportedEncoding.float32)

"""Tiny DeepSeek and gpt-oss on the GPU: greedy tokens equal Hugging Face's, decode steps come from CUDA graphs where
the family can, and the host waits for nothing then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.device import DEVICE, REHEARSAL, capture, no_waiting
from tests.gpu.families import DEEPSEEK, DENSE_DEEPSEEK, GPT_OSS, PROMPTS, greedy_of_transformers, make_family
from tests.gpu.models import Lab, request, tokens_of

NUM_STEPS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def make_lab(name: str, folder: Path, encoding: str = "float32") -> Lab:
    path = make_family(name, folder / name.replace(" ", "_"))
    return Lab(path, DEVICE, encoding)


def has_grouped_products() -> bool:
    """Whether torch's grouped products do not ask this GPU (in bfloat16): see nn.grouped_matmul_waits."""
    return not REHEARSAL and torch.cuda.get_device_capability(0)[0] in (9, 10)


@pytest.mark.parametrize("name", [DENSE_DEEPSEEK, DEEPSEEK, GPT_OSS])
def test_greedy_tokens_equal_hugging_face(name: str, folder: Path) -> None:
    """In float32, where experts keep steps out of graphs."""
    lab = make_lab(name, folder)
    assert lab.model.decode_is_capturable == (name == DENSE_DEEPSEEK)
    expected = greedy_of_transformers(folder / name.replace(" ", "_"), PROMPTS, NUM_STEPS)
    assert tokens_of(lab.runner(None, 0), request(PROMPTS, NUM_STEPS, [{}])) == expected
    if lab.model.decode_is_capturable:
        runner = lab.runner(capture(), 1)
        assert tokens_of(runner, request(PROMPTS, NUM_STEPS, [{}])) == expected
        for prompt, tokens in zip(PROMPTS[:3], expected, strict=False):
            assert tokens_of(runner, request([prompt], NUM_STEPS, [{}])) == [tokens]


@pytest.mark.parametrize("name", [DENSE_DEEPSEEK, DEEPSEEK, GPT_OSS])
def test_graphs_in_bfloat16_are_near_to_single_launches(name: str, folder: Path) -> None:
    """A graph cuts its attention into more splits, so the last bits differ and a token may, where two logits are near:
    in two rows of six at most, in the first steps."""
    if name != DENSE_DEEPSEEK and not has_grouped_products():
        pytest.skip("torch's grouped products ask this GPU")
    lab = make_lab(name, folder, "bfloat16")
    assert lab.model.decode_is_capturable
    run = request(PROMPTS, 4, [{}])
    replayed = tokens_of(lab.runner(capture(), 1), run)
    plain = tokens_of(lab.runner(None, 0), run)
    assert sum(a == b for a, b in zip(replayed, plain, strict=True)) >= len(PROMPTS) - 2


@pytest.mark.parametrize("name", [DENSE_DEEPSEEK, DEEPSEEK, GPT_OSS])
def test_the_host_waits_for_nothing_but_the_tokens(name: str, folder: Path) -> None:
    if name != DENSE_DEEPSEEK and not has_grouped_products():
        pytest.skip("torch's grouped products ask this GPU")
    lab = make_lab(name, folder, "bfloat16")
    runner, run = lab.runner(capture(), 1), request(PROMPTS, 4, [{}])
    tokens_of(runner, run)  # captures, compiles
    with no_waiting():
        tokens_of(runner, run)

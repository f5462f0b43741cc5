"""Where memory is taken when a tensor is made (a GPU's), a matrix that stays quantized never has any for its plain
numbers, and networks compute what they compute elsewhere.

python -m pytest tests/architectures/test_memory_at_load.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from max_ray.distributed import TPGroup
from max_ray.interfaces import SupportedEncoding
from max_ray.modeling import PipelineModel
from max_ray.nn import Module
from max_ray.nn.quantized_linear import QuantizedWeight
from tests.architectures.engine import Engine, load_model, random_tokens
from tests.architectures.test_llama3_quantized import CASES, load
from tests.checkpoints import make_llama
from tests.nn.memory import Allocations, like_a_gpu
from tests.nn.ranks import run_ranks

Build = Callable[[TPGroup], PipelineModel]
CHUNK = 1 << 13  # 16 rows of the widest matrix
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}


def plain(folder: Path, tied: bool) -> Build:
    """271 rows are no multiple of two ranks: the last has a row of padding."""
    path = make_llama(folder, vocab_size=271, tie_word_embeddings=tied, tokenizer=False)
    return lambda tp: load_model(path, tp)


def quantized(folder: Path, name: str) -> Build:
    path, _ = CASES[name](folder)
    return lambda tp: load(path, tp)


def quantized_while_read(folder: Path, tied: bool) -> Build:
    path = make_llama(folder, vocab_size=271, tie_word_embeddings=tied, **SIZES)
    return lambda tp: load(path, tp, SupportedEncoding.q8_0)


BUILDS: dict[str, Callable[[Path], Build]] = {
    "plain": lambda folder: plain(folder, tied=False),
    "plain, tied": lambda folder: plain(folder, tied=True),
    "gptq": lambda folder: quantized(folder, "gptq 32"),
    "fp8": lambda folder: quantized(folder, "fp8 channel"),
    "q8_0": lambda folder: quantized_while_read(folder, tied=False),
    "q8_0, tied": lambda folder: quantized_while_read(folder, tied=True),
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", list(BUILDS))
def test_logits_are_the_same(name: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, sequences = BUILDS[name](tmp_path), random_tokens([9, 1], 271)

    def logits(tp: TPGroup) -> list[torch.Tensor]:
        return Engine(build(tp)).logits_of(sequences, [[4, 5], [1]])

    like_a_gpu(monkeypatch, at_once=False)
    expected = run_ranks(size, logits)
    like_a_gpu(monkeypatch)
    for ours, theirs in zip(run_ranks(size, logits), expected, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)


def load_watched(build: Build, monkeypatch: pytest.MonkeyPatch) -> tuple[Module, Allocations]:
    monkeypatch.setattr("max_ray.nn.quantized_linear._CHUNK_ELEMENTS", CHUNK)
    with Allocations() as watched:
        model = build(TPGroup.single())
    return model.network, watched  # type: ignore[attr-defined]


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_network_never_holds_more_plain_numbers_than_a_chunk(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    like_a_gpu(monkeypatch)
    network, watched = load_watched(quantized_while_read(tmp_path, tied), monkeypatch)
    quantized = [m for _, m in network.named_modules() if isinstance(vars(m).get("weight"), QuantizedWeight)]
    assert len(quantized) == 2 * 4 + (1 if tied else 2), "all matrices of two layers, embedding and head"
    assert watched.largest <= CHUNK
    assert not any(parameter.data.is_meta for _, parameter in network.sharded_parameters())


def test_a_plain_network_gets_each_matrix_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like_a_gpu(monkeypatch)
    network, watched = load_watched(plain(tmp_path, tied=False), monkeypatch)
    matrices = [tuple(data.shape) for name, data in network.state_dict().items() if data.dim() == 2]
    for shape in set(matrices):
        assert watched.shapes.count(shape) >= matrices.count(shape), "the watch sees what is allocated"
    assert not any(parameter.data.is_meta for _, parameter in network.sharded_parameters())


def test_the_watch_sees_matrices_that_are_made_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like_a_gpu(monkeypatch, at_once=False)
    _, watched = load_watched(quantized_while_read(tmp_path, tied=False), monkeypatch)
    assert (2 * 512, 256) in watched.shapes

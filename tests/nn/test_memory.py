"""Parameters that get memory when they are filled, not before: single layers and mixtures of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from max_ray.distributed import TPGroup
from max_ray.errors import WeightsError
from max_ray.nn import ColumnParallelLinear, Experts, ParallelLMHead, VocabParallelEmbedding, pack_weights
from max_ray.nn.quantized_linear import QuantizedWeight
from max_ray.nn.stacked_experts import QuantizedStack
from max_ray.weights.load import load_weights
from tests.nn.memory import Allocations, like_a_gpu
from tests.nn.ranks import CPU, run_ranks
from tests.nn.test_moe import (
    ALIKE,
    DOWN_ONLY,
    MIXED_SEGMENTS,
    NAMES,
    PLAIN_AMONG_THEM,
    QUANTIZED_DIM,
    QUANTIZED_WIDTH,
    EachItsOwn,
    build,
    choices,
    naive,
    quantized_batch,
    quantized_checkpoint,
    quantized_experts,
)

GATE_UP, DOWN = (2 * QUANTIZED_WIDTH, QUANTIZED_DIM), (QUANTIZED_DIM, QUANTIZED_WIDTH)
CHUNK = 1 << 13
PLAIN_LATE = {name: kind for name, kind in ALIKE.items() if not name.startswith(("2", "3"))}
PLAIN_FIRST = {name: kind for name, kind in ALIKE.items() if not name.startswith("0")}
KINDS: dict[str, dict[str, str]] = {
    "plain": {},
    "alike": ALIKE,
    "down only": DOWN_ONLY,
    "segments": MIXED_SEGMENTS,
    "one plain": PLAIN_AMONG_THEM,
    "the last ones plain": PLAIN_LATE,
    "the first one plain": PLAIN_FIRST,
}


def test_memory_comes_when_a_state_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    like_a_gpu(monkeypatch)
    layer, x = ColumnParallelLinear(4, 6, TPGroup.single(CPU), bias=True), torch.randn(3, 4)
    assert layer.weight.is_meta
    with pytest.raises(WeightsError, match="1 weights were never loaded: weight"):
        pack_weights(layer)
    state = {"weight": torch.randn(6, 4), "bias": torch.randn(6)}
    with pytest.raises(ValueError, match=r"weight is \[5, 4\]"):
        layer.load_state_dict(state | {"weight": torch.randn(5, 4)})
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), x @ state["weight"].T + state["bias"])
    memory = layer.weight.data_ptr()
    layer.load_state_dict(state)
    assert layer.weight.data_ptr() == memory, "it is taken once"
    assert pack_weights(layer) == 0


def test_a_tied_head_reads_what_the_embedding_got(monkeypatch: pytest.MonkeyPatch) -> None:
    like_a_gpu(monkeypatch)
    tp = TPGroup.single(CPU)
    embedding = VocabParallelEmbedding(5, 4, tp)
    head = ParallelLMHead(5, 4, tp, tied_to=embedding)
    embedding.load_state_dict({"weight": torch.eye(5, 4)})
    assert head(torch.eye(4)[2:3]).tolist() == [[0, 0, 1, 0, 0]]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("spread", [False, True])
def test_plain_experts_are_slices_of_a_stack(spread: bool, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    like_a_gpu(monkeypatch, at_once)
    batch = choices(40)

    def run(tp: TPGroup) -> Any:
        experts = build(tp, spread=spread, grouped=True)
        weights = [parameter.data for name, parameter in experts.parameters if "down" in name and parameter.numel()]
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
        return experts(*batch)

    for result in run_ranks(2, run):
        torch.testing.assert_close(result, naive(*batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("size", [1, 2])
def test_experts_equal_those_of_a_loop(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    like_a_gpu(monkeypatch, at_once=False)
    batch = quantized_batch(9)
    expected = quantized_experts(KINDS[name], grouped=False)(*batch)
    like_a_gpu(monkeypatch)

    def run(tp: TPGroup) -> Any:
        experts = Experts(4, QUANTIZED_DIM, QUANTIZED_WIDTH, tp, grouped=True)
        load_weights(experts.sharded_parameters(), EachItsOwn(quantized_checkpoint(), KINDS[name]), NAMES)
        assert not any(parameter.data.is_meta for _, parameter in experts.parameters)
        return experts(*batch)

    for result in run_ranks(size, run):
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def watched(encodings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> tuple[Experts, Allocations]:
    like_a_gpu(monkeypatch)
    monkeypatch.setattr("max_ray.nn.quantized_linear._CHUNK_ELEMENTS", CHUNK)
    quantized_checkpoint_once = quantized_checkpoint()
    monkeypatch.setattr("tests.nn.test_moe.quantized_checkpoint", lambda: quantized_checkpoint_once)
    with Allocations() as allocations:
        experts = quantized_experts(encodings, grouped=True)
        pack_weights(experts)
    return experts, allocations


@pytest.mark.parametrize("encodings", [ALIKE, MIXED_SEGMENTS])
def test_quantized_experts_take_no_memory_for_plain_ones(
    encodings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, allocations = watched(encodings, monkeypatch)
    assert allocations.largest <= 2 * CHUNK
    assert all(isinstance(stack, QuantizedStack) for stack in experts._stacks or [None])


def test_plain_experts_take_their_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, allocations = watched({}, monkeypatch)
    assert [shape for shape in allocations.shapes if len(shape) == 3] == [(4, *GATE_UP), (4, *DOWN)]
    assert not {GATE_UP, DOWN} & set(allocations.shapes)
    assert experts.waits_for_device, "the reference implementation does"


@pytest.mark.parametrize(("encodings", "num_plain"), [(PLAIN_AMONG_THEM, 1), (PLAIN_LATE, 2), (PLAIN_FIRST, 1)])
def test_plain_experts_among_quantized_ones_hold_their_own_memory(
    encodings: dict[str, str], num_plain: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, _ = watched(encodings, monkeypatch)
    plain = [parameter.data for name, parameter in experts.parameters if name.endswith("down.weight")]
    assert len(plain) == num_plain
    assert all(data.untyped_storage().nbytes() == data.nbytes for data in plain)
    quantized = [vars(expert.down)["weight"] for expert in experts.all]
    assert sum(isinstance(weight, QuantizedWeight) for weight in quantized) == 4 - num_plain

"""A layer of quantized experts on the GPU: as a loop over experts on the CPU, without waiting, and in a graph."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from max_ray.distributed import TPGroup
from max_ray.nn import Experts
from max_ray.weights.load import load_weights
from tests.gpu.device import DEVICE, REHEARSAL, capture, no_waiting
from tests.nn.test_moe import (
    ALIKE,
    MIXED_SEGMENTS,
    NAMES,
    QUANTIZED_DIM,
    QUANTIZED_WIDTH,
    EachItsOwn,
    quantized_batch,
    quantized_checkpoint,
    quantized_experts,
)


def on_gpu(encodings: dict[str, str]) -> Experts:
    tp = TPGroup.single(DEVICE)
    experts = Experts(4, QUANTIZED_DIM, QUANTIZED_WIDTH, tp, grouped=REHEARSAL or None)
    load_weights(experts.sharded_parameters(), EachItsOwn(quantized_checkpoint(), encodings), NAMES)
    return experts


@pytest.mark.parametrize("encodings", [ALIKE, MIXED_SEGMENTS], ids=["alike", "segments"])
@pytest.mark.parametrize("num_tokens", [1, 9, 200])
def test_quantized_experts(num_tokens: int, encodings: dict[str, str]) -> None:
    batch = quantized_batch(num_tokens)
    expected = quantized_experts(encodings, grouped=False)(*batch)
    experts, inputs = on_gpu(encodings), [tensor.to(DEVICE) for tensor in batch]
    assert REHEARSAL or not experts.waits_for_device
    experts(*inputs)  # compiles
    with no_waiting():
        actual = experts(*inputs)
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-3, rtol=1e-3)
    replay = capture()(lambda: experts(*inputs))
    for _ in range(3):
        assert torch.equal(replay(), actual), "the same bits in every run"

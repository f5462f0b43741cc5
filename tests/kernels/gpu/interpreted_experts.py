"""A layer of quantized experts as on a GPU, in Triton's interpreter: equal to the reference, without a wait.

TRITON_INTERPRET=1 python -m pytest tests/kernels/gpu/interpreted_experts.py
"""

from __future__ import annotations

import pytest
import torch

from max_ray import kernels
from max_ray.kernels import gpu, reference
from tests.kernels.gpu.interpreted_pipeline import NoQuestions
from tests.nn.test_moe import ALIKE, MIXED_SEGMENTS, quantized_batch, quantized_experts


@pytest.mark.parametrize(
    ("encodings", "num_tokens"),
    [
        (MIXED_SEGMENTS, 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((ALIKE, 1), (MIXED_SEGMENTS, 40))),
    ],
    ids=["segments", "alike", "more rows"],
)
def test_quantized_experts(encodings: dict[str, str], num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some experts have 16 rows or fewer, some more; one token leaves two experts without any."""
    batch = quantized_batch(num_tokens)
    monkeypatch.setattr(kernels, "_backend", lambda x: reference)
    expected = quantized_experts(encodings, grouped=False)(*batch)
    experts = quantized_experts(encodings, grouped=True)
    monkeypatch.setattr(kernels, "_backend", lambda x: gpu)
    assert experts._settled() is not None
    with NoQuestions():
        actual = experts(*batch)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)

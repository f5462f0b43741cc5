"""Whether the layer's decode steps can be recorded."""

from __future__ import annotations

import pytest
import torch

from max_ray.distributed import TPGroup
from max_ray.nn import LatentAttention, LatentAttentionShape


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("meta", False)])
def test_the_host_plans_on_a_cpu_only(device: str, waits: bool) -> None:
    shape = LatentAttentionShape(8, 2, None, latent_dim=6, plain_dim=4, rope_dim=2, value_dim=4, scale=1.0)
    layer = LatentAttention(shape, 0, TPGroup.single(torch.device(device)), torch.float32)
    assert layer.waits_for_device is waits

"""The weights of a loaded network, in whatever form the layers hold them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from max_ray.kernels.native import PackedWeight
from max_ray.nn import Module
from max_ray.nn.quantized_linear import PlainSegment


@dataclass(frozen=True)
class Held:
    name: str
    nbytes: int
    dtype: torch.dtype


def held_weights(network: Module) -> Iterator[Held]:
    """Parameters, and packed weights without the padding of their panels."""
    for name, parameter in network.parameters:
        yield Held(name, parameter.data.nbytes, parameter.dtype)
    for prefix, module in network.named_modules():
        weight = module._packed if isinstance(module, PlainSegment) else vars(module).get("weight")
        if isinstance(weight, PackedWeight):
            yield Held(f"{prefix}weight", prod(weight.shape) * weight.dtype.itemsize, weight.dtype)

"""Activations by their names in config.json, alone and gated.

Axes: F width of a feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from max_ray import kernels
from max_ray.errors import ConfigError

# torch has two ways to compute the exact gelu, by whether rows lie side by side. They differ in their last bits, so
# that a row alone would differ from the same row among others. The one for rows side by side is faster.
Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "gelu": lambda x: F.gelu(x.contiguous()),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),  # Hendrycks and Gimpel 2016
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


def activation(name: str) -> Activation:
    """By its name in config.json. Raises ConfigError for one that is not there."""
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"config.json: activation {name!r} is not supported; those that are: {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


def activation_name(huggingface_config: Any, key: str = "hidden_act", default: str = "silu") -> str:
    """The name that stands in config.json. Raises ConfigError for an activation that is not supported."""
    name: str = huggingface_config.get(key) or default
    if name not in ACTIVATIONS:
        raise ConfigError(f"config.json: {key}={name!r} is not supported; those that are: {', '.join(ACTIVATIONS)}.")
    return name


def gated(name: str) -> Activation:
    """act(gate) * up for x = [gate | up], [..., 2F] -> [..., F]."""
    if ACTIVATIONS[name] is F.silu:
        return kernels.silu_and_mul
    act = ACTIVATIONS[name]

    def gate(x: torch.Tensor) -> torch.Tensor:
        half, up = x.chunk(2, dim=-1)
        return act(half) * up

    return gate

"""Which keys a layer's queries may see, learned from the mask that a network asks `transformers` for.

While a network is probed, its mask functions get a stand-in tensor that says what was asked for; the layer's call then
shows which one it was given. Only "all tokens before" and "a sliding window" are served by the paged cache;
chunks are, up to the end of the first one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionMaskInterface

from max_ray.errors import ConfigError

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_SAID = "max_ray_mask"
_MORE = "its masks depend on more than the positions of tokens (documents, images)"
_FAR = 2**20  # farther back than any window that is worth the name


@dataclass(frozen=True)
class MaskSaid:
    """What a mask lets a token see: itself and the `window - 1` tokens before it, or all (None). `limit`: tokens up to
    which it does, where there is such a limit. `refused`: why the mask is neither, else ""."""

    window: int | None = None
    refused: str = ""
    limit: int | None = None


def register_masks(implementation: str) -> None:
    """Masks asked for under this implementation are stand-ins (see `said_by`)."""
    AttentionMaskInterface.register(implementation, _stand_in)


def said_by(mask: torch.Tensor | None) -> MaskSaid | None:
    """What the mask of a layer's call says; None for a call without one. Raises ConfigError for a tensor that the
    network made by itself."""
    if mask is None:
        return None
    source = mask if hasattr(mask, _SAID) else mask._base
    said: MaskSaid | None = getattr(source, _SAID, None)
    if said is None:
        raise ConfigError("it gives its attention a mask or a bias of its own, which a paged cache cannot follow")
    if said.refused:
        raise ConfigError(said.refused)
    return said


def _stand_in(
    *, q_length: int, kv_length: int, mask_function: MaskFunction, local_size: int | None = None, **rest: Any
) -> torch.Tensor:
    mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=rest.get("device", "cpu"))
    said = read_mask(mask_function, local_size)
    if said.refused == _MORE and mask.is_meta:
        raise RuntimeError("a mask that is made of numbers needs them")  # the probe runs again, with numbers
    setattr(mask, _SAID, said)
    return mask


def read_mask(mask_function: MaskFunction, local_size: int | None) -> MaskSaid:
    """Asks the function at the positions where the kinds of masks differ: around the window and far beyond it."""
    window = local_size or 0
    edges = {0, 1, 2, 5, window - 1, window, window + 1, 2 * window, 2 * window + 3, _FAR - 1, _FAR, _FAR + window}
    with torch.device("cpu"):
        positions = torch.tensor(sorted(edge for edge in edges if edge >= 0))
        q, k = positions[:, None], positions[None]
        zero = torch.zeros((), dtype=torch.int64)
        try:
            seen = mask_function(zero, zero, q, k).expand(len(positions), len(positions))
        except (RuntimeError, IndexError, TypeError):  # it depends on more than positions, or is no index function
            return MaskSaid(refused=_MORE)
        if torch.equal(seen, k <= q):
            return MaskSaid()
        if window and torch.equal(seen, (k <= q) & (k > q - window)):
            return MaskSaid(window)
        if window and torch.equal(seen, (k <= q) & (k // window == q // window)):
            return MaskSaid(limit=window)
    if bool((seen & (k > q)).any()):
        return MaskSaid(refused="its tokens see later tokens (bidirectional attention)")
    return MaskSaid(refused="its masks are neither causal nor a sliding window")

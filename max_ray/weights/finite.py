"""Whether the numbers of a tensor are all finite. A NaN or an infinity in a weight makes every answer one.

On a CPU the bits are compared as integers: numbers that are not finite have the largest exponent, so they are the
largest integers of their sign. Two passes over memory that is in the cache already take a few per cent of the reading.
"""

from __future__ import annotations

import torch

from max_ray.errors import WeightsError

_INFINITIES = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
"""The integer of the same width, and the bits of infinity."""


def is_finite(x: torch.Tensor) -> bool:
    """False where a number of a float16, bfloat16, float32 or float64 tensor is infinite or NaN; true for others."""
    if x.dtype not in _INFINITIES or x.numel() == 0:
        return True
    if x.device.type != "cpu":
        return bool(torch.linalg.vector_norm(x, torch.inf).isfinite())
    integer, infinity = _INFINITIES[x.dtype]
    bits = x.detach().view(integer).numpy()
    largest_negative = bits.view(f"u{bits.dtype.itemsize}").max()
    sign = 1 << (8 * bits.dtype.itemsize - 1)
    return bool(bits.max() < infinity and largest_negative < sign | infinity)


def check_finite(tensor: str, x: torch.Tensor) -> None:
    """Raises WeightsError that names `tensor` where a number of x, all of it or a piece, is not finite."""
    if not is_finite(x):
        kind = str(x.dtype).removeprefix("torch.")
        raise WeightsError(
            f"Tensor {tensor!r} has numbers that are not finite as {kind} (NaN or infinity). The checkpoint is "
            f"damaged, or made for a dtype with a larger range."
        )

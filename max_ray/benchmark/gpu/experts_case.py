"""A case of one layer of experts with random weights, as the family's layer runs it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from max_ray.benchmark.kernel_cases import Case, relative_error
from max_ray.distributed import TPGroup
from max_ray.nn import Experts, softmax_top_k
from max_ray.weights import WeightSource
from max_ray.weights.load import load_weights
from max_ray.weights.mapping import NameMap

_NAMES = NameMap(
    [
        ("{}.gate", "all.{}.gate_up.weight:gate"),
        ("{}.up", "all.{}.gate_up.weight:up"),
        ("{}.down", "all.{}.down.weight"),
    ]
)
_SAME_BITS_RUNS = 5


@dataclass(frozen=True)
class ExpertSizes:
    """Experts of one layer: their number, hidden size, width of one, experts a token."""

    num_experts: int
    dim: int
    width: int
    top_k: int


QWEN3_30B = ExpertSizes(128, 2048, 768, 8)
TINY = ExpertSizes(4, 64, 32, 2)


class _RandomExperts(WeightSource):
    """Normal random numbers; the same name has the same numbers."""

    def __init__(self, sizes: ExpertSizes, dtype: torch.dtype, device: torch.device) -> None:
        shapes = {"gate": (sizes.width, sizes.dim), "up": (sizes.width, sizes.dim), "down": (sizes.dim, sizes.width)}
        self._shapes = {f"{i}.{name}": shape for i in range(sizes.num_experts) for name, shape in shapes.items()}
        self._dtype, self._device = dtype, device

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        values = torch.empty(self._shapes[name], dtype=self._dtype, device=self._device)
        return values.normal_(0, 0.02, generator=generator).narrow(axis, start, stop - start)


def experts_case(rows: int, sizes: ExpertSizes, device: torch.device, dtype: torch.dtype) -> Case:
    """`rows` tokens through one layer. The case is wrong, too, when two runs differ in a bit."""
    layer = Experts(sizes.num_experts, sizes.dim, sizes.width, TPGroup.single(device), grouped=True, dtype=dtype)
    source = _RandomExperts(sizes, dtype, device)
    load_weights(layer.sharded_parameters(), source, _NAMES)
    x = torch.randn(rows, sizes.dim, device=device).to(dtype)
    weights, chosen = softmax_top_k(torch.randn(rows, sizes.num_experts, device=device), sizes.top_k, renormalize=True)

    def run() -> torch.Tensor:
        out: torch.Tensor = layer(x, weights, chosen)
        return out

    def wanted() -> torch.Tensor:
        out = torch.zeros(rows, sizes.dim, device=device)
        for index in sorted(set(chosen.flatten().tolist())):
            gate, up, down = (source.get_slice(f"{index}.{n}", 0, 0, d).float() for n, d in _parts(sizes))
            hidden = F.silu(x.float() @ gate.T) * (x.float() @ up.T)
            share = (weights * (chosen == index)).sum(1, keepdim=True)
            out += share * (hidden @ down.T)
        return out

    def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
        same = all(bool(torch.equal(run(), actual)) for _ in range(_SAME_BITS_RUNS))
        return relative_error(actual, expected) if same else float("inf")

    used = len(set(chosen.flatten().tolist()))
    nbytes = (used * 3 * sizes.dim * sizes.width + 2 * rows * sizes.dim) * dtype.itemsize
    return Case(run, wanted, nbytes, 6 * rows * sizes.top_k * sizes.dim * sizes.width, error)


def _parts(sizes: ExpertSizes) -> tuple[tuple[str, int], ...]:
    return ("gate", sizes.width), ("up", sizes.width), ("down", sizes.dim)

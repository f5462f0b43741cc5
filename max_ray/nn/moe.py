"""Mixture of experts: which experts a token goes to, and the experts' feed-forward layers over a tensor-parallel group.

Axes: T tokens, K experts a token, E experts, D hidden size, F width of one expert, M = T * K choices.

A group holds the experts in one of two ways: each expert cut over its inner width, like any feed-forward layer
(default), or whole experts spread over the ranks, rank r holding E / size of them (`spread`, expert parallelism). In
both, every rank sees all tokens and gives a summand of the result, so that one sum over the ranks follows.

The choices are sorted by expert, so that each expert runs once over its tokens. On GPUs all experts run in one grouped
product of a stacked weight, plain or quantized, without asking the device how many tokens each expert got.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from max_ray import kernels
from max_ray.distributed import TPGroup, all_reduce
from max_ray.nn.linear import MergedColumnParallelLinear, Packable, RowParallelLinear, shard_range
from max_ray.nn.module import Module
from max_ray.nn.stacked_experts import Layers, PlainMemory, QuantizedStack, Stack
from max_ray.weights.parameter import PartSpec

_ALIGNMENT = 16  # bytes: rows of a grouped product's operands begin at multiples of it


def softmax_top_k(logits: torch.Tensor, top_k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] -> (weights float32 [T, K], experts int64 [T, K]): the largest of the softmax over all
    experts, made to sum to 1 where `renormalize`."""
    weights, experts = logits.float().softmax(-1).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


def keep_best_groups(scores: torch.Tensor, num_groups: int, num_kept: int, best_of_group: int) -> torch.Tensor:
    """scores [T, E] with -inf outside of each token's `num_kept` best groups of E / num_groups neighbouring experts; a
    group is worth the sum of its `best_of_group` best experts (DeepSeek-V3, DeepSeek-AI 2024, section 2.1.2)."""
    groups = scores.view(len(scores), num_groups, -1)  # [T, G, E / G]
    worth = groups.topk(best_of_group, dim=-1).values.sum(-1)
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, worth.topk(num_kept, dim=-1).indices, True)
    return groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1)


def run_by_expert(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    num_experts: int,
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Sum over K of weight * expert(x), in float32 and in the order of K: x [T, D], weights and experts [T, K] ->
    [T, D]. The same inputs give the same bits: on a GPU, sums by index would be atomic, in any order.

    run: all experts at once, (x [M, D] sorted by expert, counts int64 [E]: rows of each expert) -> [M, D].
    """
    expert_of_choice = experts.flatten()
    order = expert_of_choice.argsort(stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, expert_of_choice, torch.ones_like(expert_of_choice))
    y = run(x[order // experts.shape[1]], counts)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=x.device)
    return kernels.sum_choices(y, places.view(experts.shape), weights)


def grouped_matmul(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x [M, I] in groups of rows, group e times weights[e] of [E, I, O] -> [M, O].

    ends: int32 [E], where each group's rows end; rows after the last are left as they come. Waits for the device
    where `grouped_matmul_waits`.
    """
    if _is_aligned(weights):
        return F.grouped_mm(x, weights, offs=ends)
    out = x.new_zeros(len(x), weights.shape[2])
    start = 0
    for weight, end in zip(weights, ends.tolist(), strict=True):
        out[start:end] = x[start:end] @ weight
        start = end
    return out


def grouped_matmul_waits(weights: torch.Tensor) -> bool:
    """Whether a grouped product with `weights` [E, I, O] asks the device where the groups end: sizes that are no
    multiples of 16 bytes go group by group, and so does torch's own product but for bfloat16 on compute capability
    9 and 10."""
    if weights.device.type != "cuda" or weights.dtype != torch.bfloat16 or not _is_aligned(weights):
        return True
    return torch.cuda.get_device_capability(weights.device)[0] not in (9, 10)


def _is_aligned(weights: torch.Tensor) -> bool:
    return all(size * weights.element_size() % _ALIGNMENT == 0 for size in weights.shape[1:])


class Expert(Module):
    """down(gated(gate(x), up(x))), [M, D] -> [M, D]: this rank's summand."""

    def __init__(
        self, dim: int, hidden_dim: int, tp: TPGroup, gate: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
    ) -> None:
        self._gate = gate
        self.gate_up = MergedColumnParallelLinear(dim, {"gate": hidden_dim, "up": hidden_dim}, tp, dtype=dtype)
        self.down = RowParallelLinear(hidden_dim, dim, tp, reduce=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self._gate(self.gate_up(x)))
        return y


class Experts(Packable):
    """The experts of one layer: tokens [T, D], weights and experts [T, K] -> [T, D], summed over K in float32.

    spread: whole experts over the ranks instead of every expert cut. gate: see GatedMLP.
    reduce: whether the result is summed over the ranks; False leaves each rank its summand, for a caller that adds
    more before summing. grouped: one product for all experts; by default on GPUs, where sizes allow it and quantized
    experts are all quantized alike.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        tp: TPGroup,
        *,
        spread: bool = False,
        gate: Callable[[torch.Tensor], torch.Tensor] = kernels.silu_and_mul,
        reduce: bool = True,
        grouped: bool | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._tp = tp
        self._gate = gate
        self._reduce = reduce
        self._num_experts = num_experts
        self._local = shard_range(num_experts, tp) if spread else range(num_experts)
        part = TPGroup.single(tp.device) if spread else tp
        self.all: list[Expert | _Elsewhere] = [
            Expert(dim, hidden_dim, part, gate, dtype)
            if index in self._local
            else _Elsewhere(dim, hidden_dim, dtype, tp.device)
            for index in range(num_experts)
        ]
        self._must_group = grouped is True
        self._may_group = tp.device.type == "cuda" if grouped is None else grouped
        self._is_settled = False
        self._stacks: tuple[Stack, Stack] | None = None
        aligned = all(size * dtype.itemsize % _ALIGNMENT == 0 for size in (dim, hidden_dim // part.size))
        self._plain: list[PlainMemory] = []
        if self._must_group or (self._may_group and aligned):
            self._plain = [PlainMemory(layers, tp.device) for layers in self._layers()]

    @property
    def waits_for_device(self) -> bool:
        """Whether a forward pass asks the device how many tokens each expert got."""
        stacks = self._settled()
        return stacks is None or any(self._waits_for(stack) for stack in stacks)

    def _waits_for(self, stack: Stack) -> bool:
        if isinstance(stack, QuantizedStack):
            return not stack.multiplies_groups(self._tp.device)
        return grouped_matmul_waits(stack)

    def pack(self) -> bool:
        """Stacks quantized experts; whether there are any stacks of them. To make one takes the memory of its experts
        again for a moment, so this comes before a KV cache takes what is free."""
        return any(isinstance(stack, QuantizedStack) for stack in self._settled() or ())

    def _settled(self) -> tuple[Stack, Stack] | None:
        """The stacked weights of gate_up and down, found at the first use, after loading. None where experts
        run one by one."""
        if not self._is_settled:
            gate_up, down = (self._stack(index) for index in range(2))
            self._stacks = None if gate_up is None or down is None else (gate_up, down)
            self._is_settled = True
        return self._stacks

    def _stack(self, index: int) -> Stack | None:
        """Of gate_up (0) or down (1). None for experts that are quantized in several ways, and where a loop over them
        is as good."""
        plain = self._plain[index].stack() if self._plain else None
        quantized = QuantizedStack.of(self._layers()[index]) if self._may_group and plain is None else None
        is_better = quantized is not None and (self._must_group or quantized.multiplies_groups(self._tp.device))
        return quantized if is_better else plain

    def _layers(self) -> tuple[Layers, Layers]:
        """gate_up and down of this rank's experts."""
        local = [expert for expert in self.all if isinstance(expert, Expert)]
        return [expert.gate_up for expert in local], [expert.down for expert in local]

    def forward(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        ours_first = (experts - self._local.start) % self._num_experts
        run = self._loop if self._settled() is None else self._grouped
        out = run_by_expert(x, weights, ours_first, self._num_experts, run)
        return all_reduce(out, self._tp) if self._reduce else out

    def _loop(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """See run_by_expert. Rows of other ranks' experts become zero."""
        y = torch.zeros_like(x)
        start = 0
        for index, count in zip(self._local, counts[: len(self._local)].tolist(), strict=True):
            if count:
                expert = self.all[index]
                y[start : start + count] = expert(x[start : start + count])
            start += count
        return y

    def _grouped(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The same in two grouped products."""
        assert self._stacks is not None
        gate_up, down = self._stacks
        ends = counts[: len(self._local)].cumsum(0).to(torch.int32)
        y = _multiply(self._gate(_multiply(x, gate_up, ends)), down, ends)
        is_local = torch.arange(len(x), device=x.device) < ends[-1]
        return y.where(is_local.unsqueeze(-1), 0)


def _multiply(x: torch.Tensor, stack: Stack, ends: torch.Tensor) -> torch.Tensor:
    return stack.linear(x, ends) if isinstance(stack, QuantizedStack) else grouped_matmul(x, stack.mT, ends)


class _Elsewhere(Module):
    """An expert that another rank holds: its names are known, nothing of it is read."""

    def __init__(self, dim: int, hidden_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        nothing = PartSpec((hidden_dim, dim), 0, 0, 0, 0)
        self.gate_up = Module()
        self.gate_up.add_parameter(
            "weight", torch.empty(0, dim, dtype=dtype, device=device), {"gate": nothing, "up": nothing}
        )
        self.down = Module()
        self.down.add_parameter(
            "weight", torch.empty(dim, 0, dtype=dtype, device=device), {"": PartSpec((dim, hidden_dim), 1, 0, 0, 0)}
        )

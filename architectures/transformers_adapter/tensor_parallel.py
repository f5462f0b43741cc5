"""Tensor parallelism by a network's own plan: names of modules and parameters -> how `transformers` would cut them.

| style                                | on a module                                     | on a parameter            |
|--------------------------------------|-------------------------------------------------|---------------------------|
| colwise                              | linear layer: each rank gives part of the output | cut along its output axis |
| rowwise                              | linear layer: each rank gives a summand           | cut along its last axis   |
| colwise_gather_output, colwise_rep   | as colwise, the output gathered                   |                           |
| rowwise_split_input, rowwise_rep     | as rowwise, of an input that all ranks have whole |                           |
| packed_colwise                       | as colwise, of two matrices in one                | each half is cut          |
| moe_tp_experts, all_reduce           | the output is a summand                           |                           |
| embedding_rowwise                    | cut over the vocabulary                           |                           |
| replicate and others of that kind    | whole on every rank                               | whole on every rank       |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from architectures.transformers_adapter.attention import LayerCall
from max_ray.distributed import TPGroup
from max_ray.errors import ParallelismError
from max_ray.nn.linear import shard_range
from max_ray.weights.parameter import PartSpec

GATHERED = ("colwise_gather_output", "colwise_rep")
SPLIT = ("rowwise_split_input", "rowwise_rep")
SUMMED = ("moe_tp_experts", "all_reduce")
WHOLE = ("replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "embedding_rowwise", "local_params", "")
LINEAR = ("colwise", "rowwise", "packed_colwise", *GATHERED, *SPLIT)
CUT_PARAMETERS = ("colwise", "rowwise", "packed_colwise")

_MOST_RANKS = 64


@dataclass(frozen=True)
class TensorParallelPlan:
    """A network's plan, by patterns with `*` for numbers."""

    styles: Mapping[str, str]

    def style(self, name: str) -> str:
        """Of a module or parameter; "" where the plan does not name it."""
        return self.styles.get(re.sub(r"\d+", "*", name), "")

    def cuts_heads(self, network: Any, call: LayerCall) -> bool:
        """Whether each rank has a part of the heads of this call: its output projection sums over the ranks."""
        owner = network.get_submodule(call.module)
        names = (f"{call.module}.{name}" for name, _ in owner.named_modules() if name)
        return any(self.style(name) == "rowwise" for name in names)

    def check(self, class_name: str, network: Any, calls: tuple[LayerCall, ...], size: int) -> None:
        """Raises ParallelismError, before loading, where `size` ranks cannot hold the network."""
        if size == 1:
            return
        if not self.styles:
            raise ParallelismError(
                f"{class_name} has no tensor-parallel plan in transformers: set tensor_parallel_size=1."
            )
        unknown = sorted({style for style in self.styles.values() if style not in {*LINEAR, *SUMMED, *WHOLE}})
        if unknown:
            raise ParallelismError(
                f"The tensor-parallel plan of {class_name} has styles that are not known here: {', '.join(unknown)}. "
                "Set tensor_parallel_size=1."
            )
        wrong = self._culprit(network, calls, size)
        if wrong is not None:
            most = max(call.num_heads for call in calls)
            fits = [n for n in range(1, min(most, _MOST_RANKS) + 1) if self._culprit(network, calls, n) is None]
            raise ParallelismError(
                f"{wrong} cannot be divided over tensor_parallel_size={size}; sizes that work: "
                f"{', '.join(map(str, fits))}"
            )

    def _culprit(self, network: Any, calls: tuple[LayerCall, ...], size: int) -> str | None:
        """What `size` ranks cannot divide."""
        for call in calls:
            if self.cuts_heads(network, call) and (call.num_heads % size or call.num_kv_heads % size):
                return f"{call.num_heads} query heads and {call.num_kv_heads} key heads of {call.module}"
        for name, width in self._widths(network):
            if width % size:
                return f"{name} of width {width}"
        return None

    def _widths(self, network: Any) -> Iterator[tuple[str, int]]:
        """What must be divided: name, size."""
        for name, module in network.named_modules():
            style = self.style(name)
            if isinstance(module, torch.nn.Linear) and style in ("colwise", "rowwise", "packed_colwise"):
                width = module.in_features if style == "rowwise" else module.out_features
                yield name, width // 2 if style == "packed_colwise" else width
            elif style in ("colwise", "rowwise") and next(module.parameters(False), None) is not None:
                yield f"{name}, a {type(module).__name__} that is cut,", 1
        for name, parameter in network.named_parameters():
            style = self.style(name)
            if style in CUT_PARAMETERS:
                width = parameter.shape[cut_axis(style, parameter.dim())]
                yield name, width // 2 if style == "packed_colwise" else width


def cut_axis(style: str, num_axes: int) -> int:
    """The axis of a parameter that a style cuts: experts are [E, out, in], their biases [E, out]."""
    return num_axes - 1 if style == "rowwise" or num_axes == 1 else max(0, num_axes - 2)


def local_parts(style: str, shape: tuple[int, ...], tp: TPGroup) -> tuple[tuple[int, ...], dict[str, PartSpec]]:
    """(shape of this rank's piece of a parameter, how it is cut from the checkpoint)."""
    if tp.size == 1 or style not in CUT_PARAMETERS:
        return shape, {"": PartSpec.whole(shape)}
    axis = cut_axis(style, len(shape))
    names = ("0", "1") if style == "packed_colwise" else ("",)
    width = shape[axis] // len(names)
    rows = shard_range(width, tp)
    stored = (*shape[:axis], width, *shape[axis + 1 :])
    local = (*shape[:axis], len(rows) * len(names), *shape[axis + 1 :])
    parts = {part: PartSpec(stored, axis, rows.start, rows.stop, i * len(rows)) for i, part in enumerate(names)}
    return local, parts

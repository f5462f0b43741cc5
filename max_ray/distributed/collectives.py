"""What the ranks of a group say to each other. All ranks call the same functions in the same order and shapes.

With one rank nothing is sent. A transport failure (a dead peer, a collective that outlasts the group's timeout) is a
WorkerGroupError: the group is lost then, and its ranks must be started anew. (Between GPUs a collective only joins the
stream, so NCCL's failures show where the host next waits for the device, and its watchdog ends a process that hangs.)

gloo's ring adds an element's summands in an order that follows from its place in the buffer. From three ranks on, a row
would get other sums in another batch, so here CPUs add in rank order: see `_sum_in_rank_order`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F

from max_ray.distributed.group import TPGroup
from max_ray.errors import WorkerGroupError

_GATHERED_BYTES = 256 * 1024  # at 4 ranks faster than in parts up to here, slower above


def all_reduce(x: torch.Tensor, tp: TPGroup) -> torch.Tensor:
    """The sum of all ranks' `x`, any shape; in place where `x` is contiguous. Use the result, not `x`.

    On CPUs an element's sum does not depend on the shape of `x`; halves are added in float32 and rounded once.
    """
    if tp.size > 2 and x.numel() > 0 and x.device.type == "cpu":
        return _sum_in_rank_order(x, tp)
    return _all_reduce(x, tp, dist.ReduceOp.SUM)


def all_reduce_min(x: torch.Tensor, tp: TPGroup) -> torch.Tensor:
    """The smallest of all ranks' `x`, element by element; in place where `x` is contiguous. Use the result."""
    return _all_reduce(x, tp, dist.ReduceOp.MIN)


def all_gather(x: torch.Tensor, tp: TPGroup, axis: int) -> torch.Tensor:
    """All ranks' `x` (of one shape) side by side along `axis`, in rank order."""
    if tp.size == 1:
        return x
    parts = x.new_empty((tp.size, *x.shape))
    if x.numel() > 0:
        with _transport_errors(tp, "all_gather"):
            tp.process_group._allgather_base(parts.view(-1), x.contiguous().view(-1)).wait()
    return torch.cat(parts.unbind(0), dim=axis)


def broadcast(x: torch.Tensor, tp: TPGroup, src: int = 0) -> torch.Tensor:
    """Rank `src`'s `x`, on every rank; in place where `x` is contiguous. Use the result, not `x`."""
    if tp.size == 1 or x.numel() == 0:
        return x
    x = x.contiguous()
    options = dist.BroadcastOptions()
    options.rootRank = src
    with _transport_errors(tp, "broadcast"):
        tp.process_group.broadcast([x], options).wait()
    return x


def _sum_in_rank_order(x: torch.Tensor, tp: TPGroup) -> torch.Tensor:
    """x[0] + x[1] + ... of ranks 0, 1, ...: short tensors are gathered whole by every rank. Of long ones each rank sums
    one part and gathers the others' sums, which sends less and gives the same bits."""
    x = x.contiguous()
    flat = x.view(-1)
    group = tp.process_group
    with _transport_errors(tp, "all_reduce"):
        if flat.nbytes <= _GATHERED_BYTES:
            parts = flat.new_empty(tp.size, len(flat))
            group._allgather_base(parts.view(-1), flat).wait()
            return flat.copy_(_sum_of_rows(parts)).view(x.shape)
        width = -(-len(flat) // tp.size)
        padded = F.pad(flat, (0, width * tp.size - len(flat)))
        parts = torch.empty_like(padded)
        group.alltoall_base(parts, padded, [], []).wait()
        group._allgather_base(padded, _sum_of_rows(parts.view(tp.size, width))).wait()
    return flat.copy_(padded[: len(flat)]).view(x.shape)


def _sum_of_rows(parts: torch.Tensor) -> torch.Tensor:
    """[N, W] -> [W], row after row. (torch's own sum takes an order that depends on W.)"""
    is_half = parts.is_floating_point() and parts.element_size() < 4
    total = parts[0].to(torch.float32 if is_half else parts.dtype, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts.dtype)


def _all_reduce(x: torch.Tensor, tp: TPGroup, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if tp.size == 1 or x.numel() == 0:
        return x
    x = x.contiguous()
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp(operation)
    with _transport_errors(tp, "all_reduce"):
        tp.process_group.allreduce([x], options).wait()
    return x


@contextmanager
def _transport_errors(tp: TPGroup, operation: str) -> Iterator[None]:
    assert tp.process_group is not None, f"{operation} on a group of {tp.size} that has no transport"
    try:
        yield
    except RuntimeError as error:  # what torch.distributed raises for timeouts and lost connections
        raise WorkerGroupError(
            f"{operation} of rank {tp.rank} in a tensor-parallel group of {tp.size} failed; a rank died or hangs, "
            f"and the group must be started anew: {error}"
        ) from error

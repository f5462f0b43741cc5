"""What the ranks of a group say to each other. All ranks call the same functions in the same order and shapes.

With one rank nothing is sent. A transport failure (a dead peer, a collective that outlasts the group's timeout) is a
WorkerGroupError: the group is lost then, and its ranks must be started anew. (Between GPUs a collective only joins the
current stream, so NCCL's failures show where the host next waits for the device: see `StepDeadline`.)

gloo's ring adds an element's summands in an order that follows from its place in the buffer. From three ranks on, a row
would get other sums in another batch, so here CPUs add in rank order: see `_sum_in_rank_order`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions

from max_ray import kernels
from max_ray.distributed.group import TPGroup
from max_ray.errors import WorkerGroupError

_SENT_WHOLE_BYTES = 64 * 1024
_SLICE_BYTES = 4 * 1024**2
_SUMMANDS, _SUMS = 1, 2  # what is sent between two ranks, one after another of each


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
            options = AllgatherOptions()
            options.asyncOp = _on_own_stream(tp)
            _finish(tp.process_group._allgather_base(parts.view(-1), x.contiguous().view(-1), options))
    return torch.cat(parts.unbind(0), dim=axis)


def broadcast(x: torch.Tensor, tp: TPGroup, src: int = 0) -> torch.Tensor:
    """Rank `src`'s `x`, on every rank; in place where `x` is contiguous. Use the result, not `x`. For words of control:
    it goes through the group's control transport."""
    if tp.size == 1 or x.numel() == 0:
        return x
    x = x.contiguous()
    options = dist.BroadcastOptions()
    options.rootRank = src
    options.asyncOp = _on_own_stream(tp)
    with _transport_errors(tp, "broadcast"):
        _finish((tp.control_group or tp.process_group).broadcast([x], options))
    return x


def _sum_in_rank_order(x: torch.Tensor, tp: TPGroup) -> torch.Tensor:
    """x[0] + x[1] + ... of ranks 0, 1, ..., in place. Long tensors go in slices, so that memory stays small."""
    x = x.contiguous()
    flat = x.view(-1)
    with _transport_errors(tp, "all_reduce"):
        for part in flat.split(_SLICE_BYTES // flat.element_size()):  # type: ignore[no-untyped-call]
            if part.nbytes <= _SENT_WHOLE_BYTES:
                _sum_whole(part, tp)
            else:
                _sum_in_shares(part, tp)
    return flat.view(x.shape)


def _sum_whole(x: torch.Tensor, tp: TPGroup) -> None:
    """Every rank gets all ranks' `x` [W] and adds them."""
    rows = _scratch(tp.size * len(x), x.dtype).view(tp.size, -1)
    coming = _receive(rows.unbind(), tp, _SUMMANDS)
    sent = _send([x] * tp.size, tp, _SUMMANDS)
    rows[tp.rank].copy_(x)
    _wait(coming + sent)
    kernels.sum_rows(rows, x)


def _sum_in_shares(x: torch.Tensor, tp: TPGroup) -> None:
    """Each rank adds one share of `x` [W] and sends the sums to the others, which sends less and gives the same bits.

    Another rank's sums may come at once: it has added its share only when it has got this rank's part of it.
    """
    shares = x.tensor_split(tp.size)
    own = shares[tp.rank]
    rows = _scratch(tp.size * len(own), x.dtype).view(tp.size, -1)
    summands, sums = _receive(rows.unbind(), tp, _SUMMANDS), _receive(shares, tp, _SUMS)
    sent = _send(shares, tp, _SUMMANDS)
    rows[tp.rank].copy_(own)
    _wait(summands)
    kernels.sum_rows(rows, own)
    _wait(sent + _send([own] * tp.size, tp, _SUMS) + sums)


def _receive(to: Sequence[torch.Tensor], tp: TPGroup, tag: int) -> list[Any]:
    """Begins to receive `to[r]` from each other rank r, those first that send to this rank first."""
    ranks = [(tp.rank - distance) % tp.size for distance in range(1, tp.size)]
    return [tp.process_group.recv([to[rank]], rank, tag) for rank in ranks]


def _send(parts: Sequence[torch.Tensor], tp: TPGroup, tag: int) -> list[Any]:
    """Begins to send `parts[r]` to each other rank r."""
    ranks = [(tp.rank + distance) % tp.size for distance in range(1, tp.size)]
    return [tp.process_group.send([parts[rank]], rank, tag) for rank in ranks]


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()


class _Thread(threading.local):
    memory = torch.empty(0, dtype=torch.uint8)


_thread = _Thread()


def _scratch(count: int, dtype: torch.dtype) -> torch.Tensor:
    """`count` numbers of memory that this thread keeps between calls: new memory costs as much as the sums."""
    nbytes = count * dtype.itemsize
    if len(_thread.memory) < nbytes:
        _thread.memory = torch.empty(nbytes, dtype=torch.uint8)
    return _thread.memory[:nbytes].view(dtype)


def _all_reduce(x: torch.Tensor, tp: TPGroup, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if tp.size == 1 or x.numel() == 0:
        return x
    x = x.contiguous()
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp(operation)
    options.asyncOp = _on_own_stream(tp)
    with _transport_errors(tp, "all_reduce"):
        _finish(tp.process_group.allreduce([x], options))
    return x


def _on_own_stream(tp: TPGroup) -> bool:
    """Whether collectives take a stream of the transport's own; between GPUs they stay on the current one, which costs
    no events, in a captured graph no fork and join."""
    return tp.device.type != "cuda"


def _finish(work: Any) -> None:
    """Waits for a collective; there may be nothing to wait for on the current stream."""
    if work is not None:
        work.wait()


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

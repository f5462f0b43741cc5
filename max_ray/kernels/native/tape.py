"""A CPU's counterpart of a CUDA graph: a function's operations, recorded once and run again with no Python between.

`record` runs a function and notes what it does to memory, at two levels:

    calls of the C++ kernels       noted with their addresses; neighbours are replayed by one call into C++
    torch operations that compute  noted with their tensors; replayed one by one into the memory of the first time
    views, allocations, arange     nothing to replay: the tape keeps the memory

So a tape is right for any function whose way does not depend on numbers in tensors (as for a CUDA graph); reading
such a number is refused while recording. Inputs are read, and the output is written, where they lay the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from max_ray.kernels.native.calls import RecordedCall, recording, replay_calls

_FORBIDDEN = {
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.item,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
}
_VIEWS = {"aten::_unsafe_view", "aten::_reshape_alias"}  # whose schemas do not say so
_CONSTANTS = {"aten::arange", "aten::arange.start", "aten::arange.start_step"}  # as long as they are not written into
_ALLOCATIONS = {
    "aten::empty.memory_format",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::detach",
}


class NotRecordableError(RuntimeError):
    """The function asked for a number that a tensor holds."""


class Tape:
    """What was recorded. Calling it runs all again and gives the same output tensor, with new contents.

    output: as the recording left it. nbytes: memory that was allocated on the way and stays.
    """

    def __init__(self, output: torch.Tensor, steps: list[Callable[[], object]], memory: list[Any], nbytes: int) -> None:
        self.output = output
        self.nbytes = nbytes
        self._steps = steps
        self._memory = memory

    def __call__(self) -> torch.Tensor:
        for step in self._steps:
            step()
        return self.output

    def __len__(self) -> int:
        """How many calls a replay makes."""
        return len(self._steps)


def record(function: Callable[[], torch.Tensor]) -> Tape:
    """Runs `function` and gives its tape. Raises NotRecordableError."""
    recorder = _Recorder()
    with recording(recorder), _NoReading(), recorder:
        output = function()
    return Tape(output, recorder.finished(), recorder.memory, sum(recorder.owned.values()))


class _NoReading(TorchFunctionMode):
    """Refuses what takes numbers out of a tensor past torch's operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FORBIDDEN:
            raise NotRecordableError(f"Tensor.{func.__name__} reads a tensor: such a step cannot be recorded")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """memory: every tensor that was seen, so that no address on the tape is used again by others. owned: bytes of the
    memory that was allocated while recording, by address."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: list[Any] = []
        self.owned: dict[int, int] = {}
        self._steps: list[Callable[[], object]] = []
        self._calls: list[RecordedCall] = []
        self._constants: set[int] = set()

    def native(self, call: RecordedCall) -> None:
        self._calls.append(call)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        if _reads(func, args):
            raise NotRecordableError(f"{name} reads a tensor: such a step cannot be recorded")
        result = func(*args, **kwargs)
        self.memory.append((args, kwargs, result))
        if not func._schema.is_mutable and not _is_view(func, args, result):
            self.owned.update(_storages(result))
        if name in _CONSTANTS:
            self._constants |= _storages(result).keys()
        elif func._schema.is_mutable and self._constants & _storages(args).keys():
            raise NotRecordableError(f"{name} writes into a constant")
        elif name not in _ALLOCATIONS and not _is_view(func, args, result):
            self._end_calls()
            self._steps.append(_again(func, args, kwargs, result))
        return result

    def finished(self) -> list[Callable[[], object]]:
        self._end_calls()
        return self._steps

    def _end_calls(self) -> None:
        if self._calls:
            self._steps.append(replay_calls(self._calls))
            self._calls = []


def _reads(func: Any, args: Any) -> bool:
    """Whether the operation's result, or the result's shape, is known only once numbers are."""
    if func.name() == "aten::index.Tensor":
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _storages(tensors: Any) -> dict[int, int]:
    """Address -> bytes of the memory behind a tensor, or behind those of a sequence."""
    several = tensors if isinstance(tensors, tuple | list) else [tensors]
    storages = [tensor.untyped_storage() for tensor in several if isinstance(tensor, torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _is_view(func: Any, args: Any, result: Any) -> bool:
    """Whether an operation only gave its input's memory another shape. The schema alone does not tell: `to` and
    `reshape` may give their input back, or a copy."""
    may_alias = func.name() in _VIEWS or any(r.alias_info is not None for r in func._schema.returns)
    return may_alias and not func._schema.is_mutable and _storages(result).keys() <= _storages(args).keys()


def _again(func: Any, args: Any, kwargs: Any, result: Any) -> Callable[[], object]:
    """The operation once more, its results where the first ones lie. In-place operations just run."""
    if func._schema.is_mutable:
        return lambda: func(*args, **kwargs)
    if isinstance(result, torch.Tensor):
        return lambda: result.copy_(func(*args, **kwargs))

    def run() -> None:
        for old, new in zip(result, func(*args, **kwargs), strict=True):
            old.copy_(new)

    return run

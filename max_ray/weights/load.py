"""load_weights: fills a rank's shards from a checkpoint, and proves that nothing is missing and nothing left over.

All checks come first and need only names, shapes and dtypes: a wrong checkpoint fails before gigabytes are read.
Then one tensor (one rank's piece of it) is read at a time: beyond the shards, loading holds that piece and no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from max_ray.errors import WeightsError
from max_ray.weights.finite import check_finite
from max_ray.weights.mapping import MAX_NAMED, NameMap, OwnName, Renaming, listed, mismatch, no_place_for
from max_ray.weights.parameter import PartSpec, ShardedParameter, StoredPart
from max_ray.weights.progress import LoadProgress
from max_ray.weights.safetensors_file import read_slice_into
from max_ray.weights.source import WeightSource


@dataclass(frozen=True)
class LoadReport:
    """num_parameters: own parameters filled; num_tensors: checkpoint tensors they came from; nbytes_read: of this rank;
    dropped: checkpoint tensors that the table drops on purpose."""

    num_parameters: int
    num_tensors: int
    nbytes_read: int
    dropped: tuple[str, ...]


def load_weights(
    module_parameters: Iterable[tuple[str, ShardedParameter]], source: WeightSource, name_map: NameMap
) -> LoadReport:
    """Fills every parameter in place, converting dtypes on the way; what no part covers becomes zero. A parameter that
    may stay quantized, and is so in the source, is not filled but replaced, and so is one that is packed (`pack`). One
    that has no memory yet gets it just before it is filled.

    Raises WeightsError, before any parameter is touched, when tensors are missing or left over, two tensors lead to
    the same part, or a shape or kind of dtype is not what the network wants. (A file found damaged while it is read, or
    a number that is not finite, raises too, with the parameters in any state.)
    """
    parameters = _by_name(module_parameters)
    renaming = name_map.rename(source.names())
    wanted = {OwnName(name, part): spec for name, p in parameters.items() for part, spec in p.parts.items()}
    _check_names(wanted, renaming, name_map, source)
    tensors = {own: renaming.sources[own][0] for own in wanted}
    for own, spec in wanted.items():
        _check_tensor(source, tensors[own], spec, parameters[own.parameter].data.dtype)
    named = {name: {part: tensors[OwnName(name, part)] for part in p.parts} for name, p in parameters.items()}
    nbytes = _load_all(parameters, named, source)
    return LoadReport(len(parameters), len(tensors), nbytes, tuple(renaming.dropped))


def _load_all(
    parameters: Mapping[str, ShardedParameter], tensors: Mapping[str, Mapping[str, str]], source: WeightSource
) -> int:
    """Fills or replaces all parameters, and gives the bytes read. tensors: by parameter, the checkpoint's by part.

    Matrices that stay in a file's blocks are taken by as many threads as the products use, a matrix at a time: they are
    read and tiled without the interpreter's lock, and no thread waits for another within a matrix."""
    stored = {
        name: sum(_stored_bytes(source, tensors[name][part], spec) for part, spec in parameter.parts.items())
        for name, parameter in parameters.items()
    }
    progress, nbytes = LoadProgress(sum(stored.values())), 0
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        started = {
            name: threads.submit(_load_one, name, parameter, tensors[name], source, stored[name])
            for name, parameter in parameters.items()
            if _stays_in_blocks(parameter, tensors[name], source)
        }
        try:
            for name, parameter in parameters.items():
                task = started.pop(name, None)
                given = (name, parameter, tensors[name], source, stored[name])
                nbytes += _load_one(*given) if task is None else task.result()
                progress.add(stored[name])
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    progress.end()
    return nbytes


def _stays_in_blocks(parameter: ShardedParameter, tensors: Mapping[str, str], source: WeightSource) -> bool:
    on_cpu = parameter.data.device.type == "cpu"
    return on_cpu and parameter.keep_quantized is not None and all(map(source.block_type, tensors.values()))


def _load_one(
    name: str, parameter: ShardedParameter, tensors: Mapping[str, str], source: WeightSource, stored: int
) -> int:
    """Fills or replaces one parameter, and gives the bytes read. stored: its bytes in the checkpoint."""
    if parameter.keep_quantized is not None and any(source.quantization(tensor) for tensor in tensors.values()):
        return parameter.keep_quantized(_ordered(parameter, source, tensors))
    if parameter.pack is not None and parameter.pack(_ordered(parameter, source, tensors)):
        return stored
    parameter.take_memory()
    _zero_uncovered(name, parameter)
    return sum(_fill_part(parameter, spec, source, tensors[part]) for part, spec in parameter.parts.items())


def _stored_bytes(source: WeightSource, tensor: str, spec: PartSpec) -> int:
    """Bytes of a part as the checkpoint has it."""
    whole = math.prod(spec.checkpoint_shape)
    return source.tensor_bytes(tensor) * math.prod(spec.local_shape) // whole if whole else 0


def _ordered(parameter: ShardedParameter, source: WeightSource, tensors: Mapping[str, str]) -> list[StoredPart]:
    """The parts in the order of their places. `tensors`: the checkpoint's tensor by part."""
    ordered = sorted(parameter.parts.items(), key=lambda item: item[1].dest_start)
    return [StoredPart.of(spec, source, tensors[part]) for part, spec in ordered]


def _by_name(module_parameters: Iterable[tuple[str, ShardedParameter]]) -> dict[str, ShardedParameter]:
    parameters: dict[str, ShardedParameter] = {}
    for name, parameter in module_parameters:
        assert name not in parameters, f"two parameters of the network are called {name!r}"
        parameters[name] = parameter
    return parameters


def _check_names(wanted: dict[OwnName, PartSpec], renaming: Renaming, name_map: NameMap, source: WeightSource) -> None:
    missing = [name_map.checkpoint_name(own) or str(own) for own in wanted if own not in renaming.sources]
    unwanted = [name for own, names in renaming.sources.items() if own not in wanted for name in names]
    left_over = [name for name in renaming.unknown + unwanted if not source.adds_nothing(name)]
    problems = []
    if missing:
        problems.append(f"the checkpoint lacks {listed(missing)}")
    if left_over:
        problems.append(no_place_for(left_over))
    problems += [
        f"{' and '.join(names)} are the same weight ({own})"
        for own, names in renaming.sources.items()
        if own in wanted and len(names) > 1
    ][:MAX_NAMED]
    if problems:
        raise mismatch(problems)


def _check_tensor(source: WeightSource, tensor: str, spec: PartSpec, dtype: torch.dtype) -> None:
    shape, wanted = list(source.shape(tensor)), list(spec.checkpoint_shape)
    if shape != wanted:
        raise WeightsError(f"The shape of {tensor} is {shape} in the checkpoint, the network wants {wanted}.")
    if source.dtype(tensor).is_floating_point != dtype.is_floating_point:
        raise WeightsError(
            f"{tensor} is {source.dtype(tensor)} in the checkpoint, the network wants {dtype}. "
            f"Is this a quantized checkpoint?"
        )


def _zero_uncovered(name: str, parameter: ShardedParameter) -> None:
    """Zeroes what no part covers; asserts that parts neither overlap nor leave the parameter's memory."""
    axes = {spec.axis or 0 for spec in parameter.parts.values()}
    assert len(axes) == 1, f"{name}: the parts of a parameter are laid out along one axis, not {axes}"
    if parameter.data.dim() == 0:
        return
    axis = axes.pop()
    end = 0
    for begin, stop in sorted(_landing(spec) for spec in parameter.parts.values()):
        assert begin >= end, f"{name}: parts overlap"
        parameter.data.narrow(axis, end, begin - end).zero_()
        end = stop
    assert end <= parameter.data.shape[axis], f"{name}: parts reach to {end}, the axis has {parameter.data.shape[axis]}"
    parameter.data.narrow(axis, end, parameter.data.shape[axis] - end).zero_()


def _landing(spec: PartSpec) -> tuple[int, int]:
    """The range of the parameter's axis that a part fills."""
    return spec.dest_start, spec.dest_start + spec.local_shape[spec.axis or 0]


def _fill_part(parameter: ShardedParameter, spec: PartSpec, source: WeightSource, tensor: str) -> int:
    """Reads one part into its place; returns the number of bytes read."""
    target = parameter.data
    if target.dim():
        begin, end = _landing(spec)
        target = target.narrow(spec.axis or 0, begin, end - begin)
    whole = spec.checkpoint_shape[0] if spec.checkpoint_shape else 1
    cut = (0, 0, whole) if spec.axis is None else (spec.axis, spec.start, spec.stop)
    entry = source.file_entry(tensor) if spec.local_shape == target.shape else None
    if entry is not None and read_slice_into(entry, *cut, target):
        check_finite(tensor, target)
        return target.nbytes
    piece = source.get_slice(tensor, *cut)
    assert target.shape == piece.shape, f"{tensor}: {list(piece.shape)} does not fit {list(target.shape)}"
    target.copy_(piece)
    check_finite(tensor, target)
    return piece.nbytes

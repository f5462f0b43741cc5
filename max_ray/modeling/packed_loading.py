"""load_network: `load_weights` for a network whose weights are going to be packed (`pack_weights`).

A weight that is read whole and packed afterwards goes through memory three times, and two of them into fresh pages,
whose coming takes as long as the reading. Here a piece is read into a buffer that stays in the processor's cache, and
packed from there, by as many threads as the products use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from max_ray import kernels
from max_ray.nn.linear import Packable, put_weight
from max_ray.nn.module import Module
from max_ray.weights.finite import check_finite
from max_ray.weights.load import LoadReport, load_weights
from max_ray.weights.mapping import NameMap
from max_ray.weights.parameter import ShardedParameter, StoredPart
from max_ray.weights.safetensors_file import DTYPES, read_chunks
from max_ray.weights.safetensors_header import ITEM_BYTES, TensorEntry
from max_ray.weights.source import WeightSource

if TYPE_CHECKING:
    from max_ray.kernels.native import PackedWeight

CHUNK_BYTES = 1 << 19
"""Read at a time: it stays in the cache until it is packed."""
_STRETCH_BYTES = 1 << 22
"""What a thread takes at a time: several chunks, so that opening the file is nothing, and a part of most weights."""

_Stretch = tuple[str, TensorEntry, range, range, int]
"""A tensor, by name and place, its rows, its columns, where they land in the weight."""


def load_network(network: Module, source: WeightSource, name_map: NameMap) -> LoadReport:
    """`load_weights` of the network's parameters; those of its linear layers are packed where that can be done from the
    file. (`pack_weights` does the others.) Raises WeightsError."""
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return load_weights(_parameters(network, threads), source, name_map)


def _parameters(network: Module, threads: ThreadPoolExecutor) -> Iterator[tuple[str, ShardedParameter]]:
    modules = list(network.named_modules())
    packed = {id(module.home) for _, module in modules if isinstance(module, Packable)}
    homes = {f"{prefix}weight": module for prefix, module in modules if id(module) in packed}
    for name, parameter in network.sharded_parameters():
        home = homes.get(name)
        yield name, parameter if home is None else replace(parameter, pack=_Packer(home, parameter.data, threads))


class _Packer:
    """Packs the weight of a module. like: a tensor of the weight's shape, dtype and device (on the meta device, like a
    weight that has no memory yet, nothing is packed)."""

    def __init__(self, module: Module, like: torch.Tensor, threads: ThreadPoolExecutor) -> None:
        self._module = module
        self._like = like
        self._threads = threads

    def __call__(self, parts: Sequence[StoredPart]) -> bool:
        """See ShardedParameter."""
        entries = [part.source.file_entry(part.tensor) for part in parts]
        plain = [(part, entry) for part, entry in zip(parts, entries, strict=True) if entry is not None]
        if len(plain) < len(parts):
            return False
        packed = kernels.new_packed(self._like.shape, self._like.dtype, self._like.device)
        if packed is None or any(len(part.rows) % packed.PANEL for part in parts[:-1]):
            return False
        stretches = _stretches(plain, packed.PANEL)
        if any(DTYPES[entry.dtype] != packed.dtype for _, entry in plain):
            # torch converts with threads of its own, and has memory of its own for each thread that asks it to
            for stretch in stretches:
                _pack_stretch(packed, stretch, torch.get_num_threads())
        else:
            list(self._threads.map(lambda stretch: _pack_stretch(packed, stretch, num_threads=1), stretches))
        put_weight(self._module, packed)
        return True


def _stretches(parts: Sequence[tuple[StoredPart, TensorEntry]], panel: int) -> Iterator[_Stretch]:
    """Pieces of the parts, which follow each other in the weight."""
    first = 0
    for part, entry in parts:
        step = _rows_of(_STRETCH_BYTES, entry, part.columns, panel)
        for start in range(part.rows.start, part.rows.stop, step):
            rows = range(start, min(start + step, part.rows.stop))
            yield part.tensor, entry, rows, part.columns, first + start - part.rows.start
        first += len(part.rows)


def _pack_stretch(packed: PackedWeight, stretch: _Stretch, num_threads: int) -> None:
    name, entry, rows, columns, first_row = stretch
    for chunk in read_chunks(entry, rows, columns, _rows_of(CHUNK_BYTES, entry, columns, packed.PANEL)):
        numbers = chunk.to(packed.dtype)
        check_finite(name, numbers)
        packed.write(first_row, numbers, num_threads)
        first_row += len(chunk)


def _rows_of(nbytes: int, entry: TensorEntry, columns: range, panel: int) -> int:
    """Rows of about so many bytes, whole panels of them."""
    return max(panel, nbytes // (len(columns) * ITEM_BYTES[entry.dtype]) // panel * panel)

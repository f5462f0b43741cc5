"""A checkpoint's tensors under the names, and in the shapes, that a network of `transformers` has for them.

`transformers` knows for each network how checkpoints on the hub differ from it: names that changed, experts that are
stored one by one, fused matrices. Its own tables (`conversion_mapping`) are applied to names first, then, where a
conversion computes something, tensor by tensor as they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from max_ray.errors import WeightsError
from max_ray.weights import NameMap, TensorEntry, WeightSource
from max_ray.weights.quantized import QuantizedRows


@dataclass
class _Computed:
    """Tensors of the network that one conversion makes. sources: (checkpoint's name, pattern that it matched)."""

    first_target: str
    converter: WeightConverter
    sources: list[tuple[str, str]]

    def convert(self, read: Any, network: Any) -> dict[str, torch.Tensor]:
        """read: the checkpoint's name -> a tensor (of the data, or without memory)."""
        converter: Any = deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.first_target, name, pattern, lambda name=name: read(name))
        made = converter.convert(self.first_target, model=network, config=network.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class _Half:
    """One of two equal matrices that lie one after another along an axis of a tensor."""

    tensor: str
    axis: int
    index: int


class NetworkSource(WeightSource):
    """The checkpoint `source` in the terms of `network`, a skeleton. `dropped`: tensors that the network knows it has
    no use for. Names that lead nowhere keep the checkpoint's name, so that loading finds them left over."""

    def __init__(self, source: WeightSource, network: Any) -> None:
        self._source = source
        self._network = network
        self._plain: dict[str, str] = {}
        self._computed: dict[str, _Computed] = {}
        self._shapes: dict[str, torch.Tensor] = {}
        self._halves: dict[str, _Half] = {}
        self._last: tuple[_Computed, dict[str, torch.Tensor]] | None = None
        self.dropped: list[str] = []
        self._rename(network)

    def split_in_halves(self, name: str, axis: int) -> None:
        """Offers `name`:0 and `name`:1 in place of the tensor."""
        for index in (0, 1):
            self._halves[f"{name}:{index}"] = _Half(name, axis, index)

    def name_map(self) -> NameMap:
        """Every name as it is."""
        patterns = {re.sub(r"\d+", "{}", name) for name in self.names()}
        return NameMap([(pattern, pattern) for pattern in sorted(patterns)])

    def names(self) -> list[str]:
        split = {half.tensor for half in self._halves.values()}
        return [name for name in [*self._plain, *self._computed] if name not in split] + list(self._halves)

    def shape(self, name: str) -> tuple[int, ...]:
        if half := self._halves.get(name):
            shape = list(self.shape(half.tensor))
            shape[half.axis] //= 2
            return tuple(shape)
        if name in self._computed:
            return tuple(self._shapes[name].shape)
        return self._source.shape(self._plain.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        if name in self._computed:
            return self._shapes[name].dtype
        name = self._whole(name)
        return self._shapes[name].dtype if name in self._computed else self._source.dtype(self._plain.get(name, name))

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        if half := self._halves.get(name):
            offset = half.index * self.shape(name)[half.axis]
            if axis == half.axis:
                return self.get_slice(half.tensor, axis, start + offset, stop + offset)
            both = self.get_slice(half.tensor, axis, start, stop)
            return both.narrow(half.axis, offset, self.shape(name)[half.axis])
        if name not in self._computed:
            return self._source.get_slice(self._plain.get(name, name), axis, start, stop)
        tensor = self._compute(name)
        return tensor.narrow(axis, start, stop - start) if tensor.dim() else tensor

    def file_entry(self, name: str) -> TensorEntry | None:
        if name in self._halves or name in self._computed:
            return None
        return self._source.file_entry(self._plain.get(name, name))

    def quantization(self, name: str) -> str:
        name = self._whole(name)
        return "" if name in self._computed else self._source.quantization(self._plain.get(name, name))

    def get_quantized(self, name: str, rows: range, columns: range) -> QuantizedRows:
        if half := self._halves.get(name):
            offset = half.index * self.shape(name)[0]
            name, rows = half.tensor, range(rows.start + offset, rows.stop + offset)
        return self._source.get_quantized(self._plain.get(name, name), rows, columns)

    def tensor_bytes(self, name: str) -> int:
        if name in self._computed or name in self._halves:
            return super().tensor_bytes(name)
        return self._source.tensor_bytes(self._plain.get(name, name))

    def resolve_ties(self) -> list[str]:
        """Of weights that the network has under two names: a checkpoint may store either, or a copy, which is dropped.
        Returns the names that it stores with values of their own, which are not tied then."""
        own = []
        for target, source in self._network.all_tied_weights_keys.items():
            if target not in self._plain:
                continue
            if source not in self._plain:
                self._plain[source] = self._plain.pop(target)
            elif self.shape(target) == self.shape(source) and torch.equal(self.get(target), self.get(source)):
                self.dropped.append(self._plain.pop(target))
            else:
                own.append(target)
        return own

    def _whole(self, name: str) -> str:
        half = self._halves.get(name)
        return name if half is None else half.tensor

    def _rename(self, network: Any) -> None:
        """Sorts the checkpoint's tensors into plain, computed and dropped ones."""
        mapping = get_model_conversion_mapping(network)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        wanted = network.state_dict()
        useless = _useless(network)
        groups: dict[str, _Computed] = {}
        for name in sorted(self._source.names(), key=dot_natural_key):
            own, pattern = rename_source_key(name, renamings, converters, network.base_model_prefix, wanted)
            if own not in wanted and name in wanted:
                own, pattern = name, None
            if own in wanted and pattern is not None:
                group = groups.setdefault(own, _Computed(own, by_pattern[pattern], []))
                group.sources.append((name, pattern))
            elif own in wanted or useless is None or not useless.search(own):
                self._plain[own if own in wanted and own not in self._plain else name] = name
            else:
                self.dropped.append(name)
        for group in groups.values():
            made = self._without_memory(group)
            self._shapes.update(made)
            self._computed.update(dict.fromkeys(made, group))

    def _without_memory(self, group: _Computed) -> dict[str, torch.Tensor]:
        def read(name: str) -> torch.Tensor:
            return torch.empty(self._source.shape(name), dtype=self._source.dtype(name), device="meta")

        try:
            return group.convert(read, self._network)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            names = ", ".join(name for name, _ in group.sources[:5])
            raise WeightsError(f"{group.first_target} cannot be made of the checkpoint's {names}: {error}") from error

    def _compute(self, name: str) -> torch.Tensor:
        """A computed tensor; those made beside it are kept until another group is asked for."""
        group = self._computed[name]
        if self._last is None or self._last[0] is not group:
            self._last = None
            self._last = (group, group.convert(self._source.get, self._network))
        return self._last[1][name]


def _useless(network: Any) -> re.Pattern[str] | None:
    """Names of checkpoint tensors that the network knows it has no use for."""
    patterns: Iterable[str] = network._keys_to_ignore_on_load_unexpected or ()
    buffers = [name for name, _ in network.named_buffers()]
    known = {*patterns}
    if any(name.endswith("inv_freq") for name in buffers):
        known.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        known.add(r"(^|\.)position_ids$")
    return re.compile("|".join(f"({pattern})" for pattern in sorted(known))) if known else None

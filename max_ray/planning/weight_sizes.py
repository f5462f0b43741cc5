"""How many bytes of weights a rank will hold, from the headers of the checkpoint. No torch, no weights.

Quantized matrices that would be cut within a group of columns are refused here, before anything is read. Matrices are
cut over the ranks, everything of one axis (norms, biases) is counted whole on each; keys and values are
held twice where there are fewer KV heads than ranks. What the table of names drops is not counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from max_ray.huggingface import HuggingFaceConfig
from max_ray.interfaces import SupportedEncoding, WeightsFormat
from max_ray.planning.checkpoint import open_checkpoint
from max_ray.registry import SupportedArchitecture
from max_ray.weights import NameMap, OwnName, WeightSource
from max_ray.weights.mapping import listed, mismatch, no_place_for

_EMBEDDING = "embed_tokens.weight"
_LAYER = re.compile(r"layers\.(\d+)\.")
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_TILE = 16  # rows of a quantized matrix are padded to whole tiles
_GROUPS = {"layers": "layers", "embed_tokens": "embedding", "lm_head": "head", "visual": "vision tower"}
_WHOLE = ("vision tower",)  # on every rank
_CUT_BY_COLUMNS = ("out", "down")  # what the layers of max_ray.nn call those that give a summand of their output


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of one rank by group ("layers", "embedding", "head", "vision tower", "other")."""

    groups: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.groups.values())


def weight_sizes(
    model_path: Path,
    weights_format: WeightsFormat,
    architecture: SupportedArchitecture,
    hf_config: HuggingFaceConfig,
    encoding: SupportedEncoding,
    num_ranks: int,
    num_kv_heads: int,
    spread_experts: bool = False,
) -> WeightSizes:
    """num_kv_heads: of one rank. spread_experts: whole ones over the ranks. Raises ModelPathError and WeightsError for
    files that cannot be used, ParallelismError for ranks that cannot cut them."""
    source, own = checked_checkpoint(model_path, weights_format, architecture, hf_config, encoding)
    text = hf_config.text_part
    all_kv_heads = text.get("num_key_value_heads") or text.get("num_attention_heads") or num_kv_heads
    kv_share = num_kv_heads / all_kv_heads
    groups: dict[str, int] = {}
    for tensor, name in own.items():
        path = name.parameter.split(".")
        group = _GROUPS.get(path[0], "other")
        is_whole = group in _WHOLE or (spread_experts and "experts" in path)
        is_cut = num_ranks > 1 and not is_whole and any(part in _CUT_BY_COLUMNS for part in path[-2:-1])
        if is_cut and source.quantization(tensor):
            source.check_columns(tensor, range(source.shape(tensor)[1] // num_ranks))
        share = kv_share if name.part in ("k", "v") else 1 / num_ranks
        size = _tensor_bytes(source, tensor, encoding, 1.0 if group in _WHOLE else share)
        groups[group] = groups.get(group, 0) + size
    return WeightSizes(groups)


def checked_checkpoint(
    model_path: Path,
    weights_format: WeightsFormat,
    architecture: SupportedArchitecture,
    hf_config: HuggingFaceConfig,
    encoding: SupportedEncoding,
) -> tuple[WeightSource, dict[str, OwnName]]:
    """The checkpoint, and the own names of its tensors. Raises what `weight_sizes` does, as far as the ranks are no
    matter."""
    source = open_checkpoint(model_path, weights_format, hf_config, encoding)
    adapter = architecture.weight_adapters.get(weights_format)
    name_map = None if adapter is None else adapter(hf_config)
    own = _own_names(source, name_map, hf_config.text_part.get("num_hidden_layers"))
    if isinstance(name_map, NameMap) and (problems := list(_misfits(source, name_map, own, hf_config.text_part))):
        raise mismatch(problems)
    return source, own


def _misfits(
    source: WeightSource, name_map: NameMap, own_names: Mapping[str, OwnName], config: Mapping[str, Any]
) -> Iterator[str]:
    """The usual signs of a config.json that is another checkpoint's. Loading compares every tensor, but a start that
    fails there has lost some seconds."""
    own = {str(name): tensor for tensor, name in own_names.items()}
    for name in (_EMBEDDING, "lm_head.weight"):
        theirs = name_map.checkpoint_name(OwnName.parse(name))
        if theirs is not None and name not in own:
            yield f"the checkpoint lacks {listed([theirs])}"
    layers = {int(match[1]) for name in own if (match := _LAYER.match(name))}
    wanted = config.get("num_hidden_layers")
    if layers and isinstance(wanted, int) and layers != set(range(wanted)):
        yield f"num_hidden_layers is {wanted}, the checkpoint has layers {_ranges(layers)}"
    vocab_size = config.get("vocab_size")
    if _EMBEDDING in own and isinstance(vocab_size, int):
        rows = source.shape(own[_EMBEDDING])[0]
        if rows != vocab_size:
            yield f"vocab_size is {vocab_size}, {own[_EMBEDDING]} has {rows} rows"


def _ranges(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> "0 to 2 and 5"."""
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    stops = sorted(n for n in numbers if n + 1 not in numbers)
    return " and ".join(f"{a} to {b}" if a < b else str(a) for a, b in zip(starts, stops, strict=True))


def _own_names(source: WeightSource, name_map: object, num_layers: object) -> dict[str, OwnName]:
    """Checkpoint tensor -> own name of every tensor that is loaded; with no table, its own. Layers after the last that
    add nothing are left out. Raises WeightsError for tensors that the table does not know."""
    if not isinstance(name_map, NameMap):
        return {name: OwnName(name) for name in source.names()}
    renaming = name_map.rename(source.names())
    if left_over := [name for name in renaming.unknown if not source.adds_nothing(name)]:
        raise mismatch([no_place_for(left_over)])
    return {
        tensor: own
        for own, tensors in renaming.sources.items()
        for tensor in tensors
        if not (_is_after_the_last(own, num_layers) and source.adds_nothing(tensor))
    }


def _is_after_the_last(own: OwnName, num_layers: object) -> bool:
    match = _LAYER.match(own.parameter)
    return match is not None and isinstance(num_layers, int) and int(match[1]) >= num_layers


def _tensor_bytes(source: WeightSource, tensor: str, encoding: SupportedEncoding, share: float) -> int:
    shape = source.shape(tensor)
    if len(shape) < 2:
        return math.prod(shape) * _ITEM_BYTES[encoding.cache_dtype]
    if not source.quantization(tensor):
        return math.ceil(math.prod(shape) * share) * _ITEM_BYTES[encoding.cache_dtype]
    rows = -(-shape[0] // _TILE) * _TILE
    return math.ceil(rows * math.prod(shape[1:]) * share * source.packed_bits(tensor) / 8)

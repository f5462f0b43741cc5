"""What to change where a model does not fit: settings near the given ones that do, each tried before it is offered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from max_ray.config import PipelineConfig
from max_ray.errors import ConfigError
from max_ray.interfaces import SupportedEncoding
from max_ray.planning.hardware import GIB
from max_ray.planning.memory_plan import MemoryPlan

Changes = dict[str, Any]
Replan = Callable[[Changes], MemoryPlan]
"""Makes the plan with some settings changed. Raises ConfigError where these cannot be."""

_LEAST_LENGTH = 128  # a shorter one helps no user
_RANKS = (2, 4, 8, 16)


def nearest_settings(
    config: PipelineConfig, plan: MemoryPlan, encodings: Iterable[SupportedEncoding], num_gpus: int, replan: Replan
) -> list[str]:
    """Flags to paste, one suggestion an entry, of the settings that fit; empty where nothing does."""
    singles: list[Changes] = []
    encodings = list(encodings)
    for changes in _candidates(config, plan, encodings, num_gpus):
        if not any(one.keys() == changes.keys() for one in singles) and _fits(replan, changes):
            singles.append(changes)
    shorter = _shorter(plan)
    found = ([shorter] if shorter and _fits(replan, shorter) else []) + singles
    if (both := _smaller_and_shorter(encodings, replan)) is not None and _fits(replan, both):
        found.append(both)
    if not found:
        found = list(_combined(config, plan, encodings, replan))[:1]
    return [_flags(changes) for changes in found]


def _candidates(
    config: PipelineConfig, plan: MemoryPlan, encodings: list[SupportedEncoding], num_gpus: int
) -> Iterator[Changes]:
    for size in (16, 4, 1):
        if size < plan.max_batch_size:
            yield {"max_batch_size": size}
    left = (plan.capacity or 0) - plan.fixed
    if config.kv_cache_memory is not None and left > 0:
        yield {"kv_cache_memory": f"{math.floor(left / GIB * 1000) / 1000:.3f}"}
    if config.max_batch_input_tokens > 256:
        yield {"max_batch_input_tokens": 256, "max_batch_size": min(16, plan.max_batch_size)}
    for ranks in _RANKS:
        if plan.device == "cuda" and config.tensor_parallel_size < ranks <= num_gpus and not config.device_choice.ids:
            yield {"tensor_parallel_size": ranks}
    for encoding in encodings:  # the nearest one first
        yield {"quantization_encoding": encoding.value}


def _smaller_and_shorter(encodings: list[SupportedEncoding], replan: Replan) -> Changes | None:
    """The nearest encoding with which a shorter length fits; None where a nearer one fits in full."""
    for encoding in encodings:
        changes: Changes = {"quantization_encoding": encoding.value}
        try:
            tried = replan(changes)
        except ConfigError:
            continue
        if tried.shortage == 0:
            return None
        if shorter := _shorter(tried):
            return changes | shorter
    return None


def _combined(
    config: PipelineConfig, plan: MemoryPlan, encodings: list[SupportedEncoding], replan: Replan
) -> Iterator[Changes]:
    """Several changes at once, where none alone is enough: a small step, then each encoding, then a shorter length."""
    small = {"max_batch_size": 1, "max_batch_input_tokens": min(256, config.max_batch_input_tokens)}
    for changes in ({}, *({"quantization_encoding": encoding.value} for encoding in encodings)):
        try:
            tried = replan(small | changes)
        except ConfigError:
            continue
        if tried.shortage == 0:
            yield small | changes
        elif shorter := _shorter(tried):
            yield small | changes | shorter


def _shorter(plan: MemoryPlan) -> Changes | None:
    return {"max_length": plan.longest} if _LEAST_LENGTH <= plan.longest < plan.max_length else None


def _fits(replan: Replan, changes: Changes) -> bool:
    try:
        return replan(changes).shortage == 0
    except ConfigError:
        return False


def _flags(changes: Changes) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())

"""Our attention as one of `transformers`' attention functions ("max_ray"): what every layer of a network calls there.

A network's modules each hold a *handler* (attribute `HANDLER`), and the registered function passes a layer's call on to
it: nothing about a step lives outside of the network that runs it. The handler of a served network is PagedAttention;
the probe and the check before serving have their own (probe.py, check.py).

Axes: T tokens of a flat batch, H query heads, KVH key heads, Dk and Dv sizes of key and value heads, D of the cache's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from max_ray import kernels
from max_ray.errors import ConfigError
from max_ray.interfaces import KVCacheInputs

IMPLEMENTATION = "max_ray"
PROBING = "max_ray_probe"
HANDLER = "max_ray_attention"
SINKS = ("s_aux", "sinks")


@dataclass(frozen=True)
class LayerCall:
    """One call of the attention function in a forward pass, as the probe saw it. Counts are of the whole model.

    module: the calling module's name. window: of a sliding window; None where a token sees all before it. limit: tokens
    up to which it does, where attention is in chunks; None without a limit.
    """

    module: str
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    limit: int | None = None


class Handler(Protocol):
    """Answers a layer's call: q [1, H, T, Dk], k [1, KVH, T, Dk], v [1, KVH, T, Dv] -> [1, T, H, Dv]."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
    ) -> torch.Tensor: ...


def attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What `transformers` calls. The weights of attention are never returned."""
    handler: Handler = getattr(module, HANDLER)
    options["module"] = module
    return handler.attend(query, key, value, attention_mask, options), None


def register() -> None:
    """Makes the two implementations known to `transformers`; again is harmless. Only the probe's has masks."""
    from architectures.transformers_adapter.masks import register_masks

    AttentionInterface.register(IMPLEMENTATION, attention_function)
    AttentionInterface.register(PROBING, attention_function)
    register_masks(PROBING)


def scale_of(q: torch.Tensor, options: dict[str, Any]) -> float:
    """What multiplies q k^T: the call's `scaling`, else 1 / sqrt(Dk)."""
    given = options.get("scaling")
    return float(given) if given is not None else float(q.shape[-1]) ** -0.5


def sinks_of(options: dict[str, Any]) -> torch.Tensor | None:
    """[H], a score beside those of the keys, where the layer has one."""
    found = [options[name] for name in SINKS if options.get(name) is not None]
    return found[0].flatten() if found else None


class PagedAttention:
    """The handler of a served network: writes keys and values into the paged cache and attends over it.

    The n-th call of a step owns layer n of the cache; so a module that runs twice has two layers. Where heads differ
    between layers the cache has the widest: narrower ones are padded with zeros, fewer key heads are repeated.
    """

    def __init__(self, calls: tuple[LayerCall, ...]) -> None:
        self._calls = calls
        self._next = 0
        self._kv: KVCacheInputs | None = None
        self._qo_indptr: torch.Tensor | None = None

    def begin(self, kv: KVCacheInputs, qo_indptr: torch.Tensor) -> None:
        """Before a forward pass."""
        self._kv, self._qo_indptr, self._next = kv, qo_indptr, 0

    def end(self) -> None:
        """After it: the step's tensors are let go."""
        assert self._next == len(self._calls), f"{self._next} attention calls in a step, not {len(self._calls)}"
        self._kv = self._qo_indptr = None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
    ) -> torch.Tensor:
        assert self._kv is not None, "attention outside of a step"
        assert self._qo_indptr is not None, "attention outside of a step"
        index, self._next = self._next, self._next + 1
        keys, values = self._kv.keys[index], self._kv.values[index]
        num_kv_heads, width = keys.shape[2:]
        value_dim = v.shape[-1]
        kernels.append_paged_kv_cache(
            _fitted(k, num_kv_heads, width), _fitted(v, num_kv_heads, width), keys, values, self._kv.slot_mapping
        )
        attended = kernels.paged_attention(
            _fitted(q, q.shape[1], width),
            keys,
            values,
            self._kv,
            self._qo_indptr,
            scale=scale_of(q, options),
            sliding_window=self._calls[index].window,
            logit_softcap=options.get("softcap"),
            sinks=sinks_of(options),
        )
        return attended[None, ..., :value_dim].contiguous()


def _fitted(x: torch.Tensor, num_heads: int, width: int) -> torch.Tensor:
    """[1, KVH, T, d] -> [T, num_heads, width]."""
    tokens = x[0].transpose(0, 1)
    if tokens.shape[1] != num_heads:
        tokens = tokens.repeat_interleave(num_heads // tokens.shape[1], dim=1)
    if tokens.shape[2] != width:
        tokens = F.pad(tokens, (0, width - tokens.shape[2]))
    return tokens.contiguous()


def check_calls(calls: tuple[LayerCall, ...]) -> None:
    """Raises ConfigError where one cache of the widest heads cannot serve all layers."""
    most = max(call.num_kv_heads for call in calls)
    for call in calls:
        if most % call.num_kv_heads or call.num_heads % most:
            raise ConfigError(
                f"{call.module} has {call.num_kv_heads} key heads and {call.num_heads} query heads, other layers have "
                f"{most} key heads: one paged cache cannot hold both."
            )

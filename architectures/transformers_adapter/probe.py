"""What a network of `transformers` does with its attention, seen rather than guessed from config.json.

The network is built without memory and run once over a few tokens; each call of the attention function is noted:
who calls, with how many heads of which size, under which mask. That gives the shape of the KV cache, the windows of
the layers, and, where a paged cache cannot serve the network, the reason.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch

from architectures.transformers_adapter.attention import HANDLER, PROBING, LayerCall, check_calls, sinks_of
from architectures.transformers_adapter.masks import said_by
from architectures.transformers_adapter.skeleton import (
    FOREIGN_ERRORS,
    build_skeleton,
    computed_buffers,
    fill_computed_buffers,
    one_line,
)
from max_ray.errors import ConfigError

NUM_TOKENS = 5
# Options of a layer's call that change nothing here, and those that PagedAttention honours.
_HARMLESS = {"module", "dropout", "position_ids", "position_embeddings", "use_cache", "cache_position", "is_causal"}
_HONOURED = {"scaling", "softcap", "sliding_window", "s_aux", "sinks"}


@dataclass
class Recorder:
    """The handler while a network is probed: notes the calls, and answers zeros."""

    names: dict[int, str]
    calls: list[LayerCall] = field(default_factory=list)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
    ) -> torch.Tensor:
        module = options["module"]
        name = self.names[id(module)]
        if q.shape[:1] + q.shape[2:3] != (1, NUM_TOKENS) or k.shape[2] != NUM_TOKENS:
            raise _Refusal(
                f"{name} attends from {q.shape[2]} to {k.shape[2]} tokens where {NUM_TOKENS} are new: it caches or "
                "compresses keys by itself, or attends to something else"
            )
        _check_options(name, options)
        try:
            said = said_by(mask)
        except ConfigError as error:
            raise _Refusal(str(error)) from error
        window = _window_without_mask(module, options) if said is None else said.window
        shapes = (q.shape[1], k.shape[1], k.shape[3], v.shape[3])
        self.calls.append(LayerCall(name, *shapes, window, None if said is None else said.limit))
        return v.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])


class _Refusal(Exception):
    """A reason why the paged cache cannot serve a network; not one of FOREIGN_ERRORS."""


def probe(class_name: str, config: Any) -> tuple[tuple[LayerCall, ...], dict[str, str]]:
    """(the attention calls of one forward pass, in order; the network's tensor-parallel plan). Raises ConfigError with
    the reason where the adapter cannot run the network."""
    network = build_skeleton(class_name, config, torch.float32, PROBING)
    check_signature(network)
    recorder = Recorder({id(module): name for name, module in network.named_modules()})
    for module in network.modules():
        setattr(module, HANDLER, recorder)
    try:
        _run(network, recorder)
    except _Refusal as refusal:
        raise ConfigError(f"{class_name} cannot run on a paged cache: {refusal}.") from refusal
    if not recorder.calls:
        raise ConfigError(
            f"{class_name} cannot run on a paged cache: its attention, if it has any, does not go through "
            "transformers' attention interface."
        )
    calls = tuple(recorder.calls)
    check_calls(calls)
    return calls, dict(network.tp_plan or {})


def check_signature(network: Any) -> None:
    """Raises ConfigError for a network whose tokens cannot be given positions."""
    name, parameters = type(network).__name__, inspect.signature(network.forward).parameters
    takes_more = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if "position_ids" not in parameters and not takes_more:
        raise ConfigError(f"{name} cannot run on a paged cache: its forward takes no position_ids.")


def _run(network: Any, recorder: Recorder) -> None:
    """On the meta device, where nothing is computed; where the network asks for a number, with weights of zeros that
    share one element of memory."""
    try:
        _forward(network, torch.device("meta"))
    except FOREIGN_ERRORS:
        recorder.calls.clear()
        _give_zeros(network)
        try:
            _forward(network, torch.device("cpu"))
        except FOREIGN_ERRORS as error:
            raise _Refusal(f"its code fails on a flat batch without a cache of its own ({one_line(error)})") from error


def _forward(network: Any, device: torch.device) -> None:
    tokens = torch.arange(NUM_TOKENS, device=device)[None]
    # a mask of ones keeps transformers from looking for packed sequences in the positions
    mask = torch.ones(1, NUM_TOKENS, dtype=torch.int64, device=device)
    with torch.no_grad():
        network(input_ids=tokens, position_ids=tokens, attention_mask=mask, use_cache=False)


def _give_zeros(network: Any) -> None:
    cpu = torch.device("cpu")
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                    tensors[name] = zeros if tensors is module._buffers else torch.nn.Parameter(zeros, False)
    fill_computed_buffers(network, computed_buffers(network, ()), cpu)


def _check_options(name: str, options: dict[str, Any]) -> None:
    if options.get("is_causal") is False:
        raise _Refusal(f"{name} asks for attention that is not causal")
    if options.get("softcap") is not None and sinks_of(options) is not None:
        raise _Refusal(f"{name} has a soft cap and sinks together")
    unknown = sorted(
        option
        for option, value in options.items()
        if option not in _HARMLESS | _HONOURED and value is not None and value is not False
    )
    if unknown:
        raise _Refusal(f"{name} asks its attention for what ours does not know ({', '.join(unknown)})")


def _window_without_mask(module: Any, options: dict[str, Any]) -> int | None:
    """The window of a layer that was given no mask at all: what it says itself."""
    if getattr(module, "is_causal", True) is False:
        raise _Refusal("its tokens see later tokens (bidirectional attention)")
    window = options.get("sliding_window")
    return int(window) if window else None

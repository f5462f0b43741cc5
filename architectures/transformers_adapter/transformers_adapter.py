"""TransformersNetwork: a network of `transformers` as our engine runs it: tokens in, logits out, over a paged cache.

The modelling code is `transformers`' own, and is given the whole ragged batch as one row of tokens with positions;
where it calls its attention function, ours runs (attention.py). Linear layers, embedding and head are ours (layers.py).
Parameters carry `transformers`' names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from architectures.transformers_adapter.attention import HANDLER, IMPLEMENTATION, Handler, PagedAttention
from architectures.transformers_adapter.layers import Slot, linear_slot, vocabulary_slots
from architectures.transformers_adapter.long_rope import place_long_ropes
from architectures.transformers_adapter.model_config import AdapterConfig
from architectures.transformers_adapter.skeleton import (
    build_skeleton,
    computed_buffers,
    fill_computed_buffers,
    float32_names,
)
from architectures.transformers_adapter.tensor_parallel import SUMMED, TensorParallelPlan, local_parts
from max_ray.distributed import TPGroup, all_reduce
from max_ray.nn import ForwardBatch, Module
from max_ray.weights.parameter import ShardedParameter


class TransformersNetwork(Module):
    """One rank of a network of `transformers`. Weights are uninitialised until loaded.

    stored: names that the checkpoint has, in the network's own terms (see weight_adapters.py).
    untied: tied names that the checkpoint stores with other values, so that they are weights of their own.
    """

    def __init__(
        self,
        config: AdapterConfig,
        network_config: Any,
        tp: TPGroup,
        dtype: torch.dtype,
        stored: Collection[str],
        untied: Collection[str] = (),
    ) -> None:
        self._tp = tp
        self._dtype = dtype
        self._plan = TensorParallelPlan(dict(config.tp_plan))
        self._slots: dict[str, Slot] = {}
        self._rest: dict[str, ShardedParameter] = {}
        self.linears: list[Module] = []
        self._network = build_skeleton(config.class_name, network_config, dtype, IMPLEMENTATION)
        for name in untied:
            _untie(self._network, name)
        self._keeps_float32 = float32_names(self._network, dtype)
        computed = computed_buffers(self._network, stored)
        self._place_slots()
        self._place_rest(stored, computed)
        fill_computed_buffers(self._network, computed, tp.device)
        self._long_ropes = place_long_ropes(self._network)
        self._sum_outputs()
        self._paged = PagedAttention(config.calls)
        self.set_handler(self._paged)
        self._keeps_logits = "logits_to_keep" in inspect.signature(self._network.forward).parameters

    @property
    def device(self) -> torch.device:
        return self._tp.device

    def sharded_parameters(self) -> Iterator[tuple[str, ShardedParameter]]:
        """See Module; by `transformers`' names."""
        for prefix, slot in self._slots.items():
            for name, parameter in slot.layer.sharded_parameters():
                yield f"{prefix}.{name}", parameter
        yield from self._rest.items()

    def set_handler(self, handler: Handler) -> None:
        """Who answers the layers' attention calls from now on."""
        for module in self._network.modules():
            setattr(module, HANDLER, handler)

    def restore(self) -> None:
        """Ends a time of another handler. Layers that alone have read their weight may be packed now."""
        self.set_handler(self._paged)
        self.linears = [slot.layer for slot in self._slots.values() if not slot.weight_was_read]

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits [N, V]; the new keys and values go into `batch.kv`."""
        for rope in self._long_ropes:
            rope.lengths = batch.rope_lengths
        self._paged.begin(batch.kv, batch.qo_indptr)
        logits = self.logits(batch.tokens, batch.positions, batch.logit_indices)
        self._paged.end()
        return logits

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor | None, logit_indices: torch.Tensor) -> torch.Tensor:
        """As `forward`, with the handler that is set. positions: None leaves them to the network."""
        inputs: dict[str, Any] = {"input_ids": tokens[None], "use_cache": False}
        if positions is not None:
            inputs["position_ids"] = positions[None]
        if self._keeps_logits:
            logits: torch.Tensor = self._network(**inputs, logits_to_keep=logit_indices).logits[0]
            return logits
        logits = self._network(**inputs).logits[0]
        return logits[logit_indices]

    def _place_slots(self) -> None:
        """Our layers in place of the network's linear layers, and of its embedding and head where they are plain."""
        shared = _shared_parameters(self._network)
        vocabulary = self._place_vocabulary()
        for name, module in list(self._network.named_modules()):
            if name in vocabulary or type(module) is not torch.nn.Linear:
                continue
            if any(id(p) in shared for p in module.parameters()) or self._is_float32(f"{name}.weight"):
                continue
            self._set(name, linear_slot(module, self._plan.style(name), self._tp, self._dtype))

    def _place_vocabulary(self) -> set[str]:
        """Names of embedding and head, where both are of the plain kind; else they stay as they are, and whole."""
        embedding, head = self._network.get_input_embeddings(), self._network.get_output_embeddings()
        plain = type(embedding) is torch.nn.Embedding and type(head) is torch.nn.Linear
        if not plain or head.bias is not None or head.weight.shape != embedding.weight.shape:
            return set()
        if embedding.max_norm is not None or embedding.weight.dtype != self._dtype:
            return set()
        names = {id(module): name for name, module in self._network.named_modules()}
        embedding_name, head_name = names[id(embedding)], names[id(head)]
        tied = head.weight is embedding.weight
        embedding_slot, head_slot = vocabulary_slots(embedding, head, tied, self._tp, self._dtype)
        self._set(embedding_name, embedding_slot)
        self._set(head_name, head_slot)
        return {embedding_name, head_name}

    def _set(self, name: str, slot: Slot) -> None:
        self._network.set_submodule(name, slot)
        self._slots[name] = slot

    def _place_rest(self, stored: Collection[str], computed: Collection[str]) -> None:
        """Memory for all other parameters and for the buffers that the checkpoint has; what is tied shares it."""
        placed: dict[int, torch.Tensor] = {}
        names = _names_by_tensor(self._network)
        for prefix, module in self._network.named_modules():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    name = f"{prefix}.{key}".lstrip(".")
                    if tensor is None or name in computed:
                        continue
                    if id(tensor) not in placed:
                        own = next((n for n in names[id(tensor)] if n in stored), name)
                        placed[id(tensor)] = self._placed(own, tensor)
                    tensors[key] = placed[id(tensor)]

    def _placed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        style = self._plan.style(name)
        shape, parts = local_parts(style, tuple(tensor.shape), self._tp)
        dtype = torch.float32 if self._is_float32(name) and tensor.is_floating_point() else tensor.dtype
        data = torch.empty(shape, dtype=dtype, device=self._tp.device)
        self._rest[name] = ShardedParameter(data, parts)
        return torch.nn.Parameter(data, False) if isinstance(tensor, torch.nn.Parameter) else data

    def _is_float32(self, name: str) -> bool:
        return self._keeps_float32 is not None and self._keeps_float32.search(name) is not None

    def _sum_outputs(self) -> None:
        """Modules whose output is a rank's summand sum it over the ranks."""
        if self._tp.size == 1:
            return
        for name, module in self._network.named_modules():
            if self._plan.style(name) in SUMMED:
                module.register_forward_hook(_summing(self._tp))


def _summing(tp: TPGroup) -> Callable[[torch.nn.Module, Any, torch.Tensor], torch.Tensor]:
    def sum_output(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return all_reduce(output, tp)

    return sum_output


def _names_by_tensor(network: Any) -> dict[int, list[str]]:
    """All names of each parameter and buffer, by the tensor's id."""
    names: dict[int, list[str]] = {}
    for tensors in (network.named_parameters, network.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return names


def _shared_parameters(network: Any) -> set[int]:
    """Ids of the parameters that have several names."""
    return {key for key, names in _names_by_tensor(network).items() if len(names) > 1}


def _untie(network: Any, name: str) -> None:
    """Gives a tied name a parameter of its own."""
    owner, _, key = name.rpartition(".")
    module = network.get_submodule(owner)
    module._parameters[key] = torch.nn.Parameter(torch.empty_like(module._parameters[key]), False)

"""Module: the base of all layers. It finds parameters and submodules in plain attributes when asked, and adds nothing
to the path of a forward pass: attribute access is Python's own, and `model(x)` is `model.forward(x)`.

A class without `__init__` takes its annotations as keywords:

    class MLP(Module):
        fc1: Linear
        fc2: Linear

    mlp = MLP(fc1=Linear(10, 20), fc2=Linear(20, 5))

A layer with weights has an `__init__` and calls `add_parameter`. Submodules are attributes, or items of lists, tuples
and dicts that are attributes; attributes with a leading underscore are not searched. A module reached twice (a shared
one) counts once, under its first name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, dataclass_transform

import torch

from max_ray.driver import DeviceLike, as_torch_device
from max_ray.errors import nearest
from max_ray.weights.parameter import PartSpec, ShardedParameter, StoredPart


@dataclass(frozen=True)
class Parameter:
    """One parameter as seen from outside; `data` is the memory itself, not a copy."""

    data: torch.Tensor

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    def numel(self) -> int:
        return self.data.numel()


@dataclass_transform(kw_only_default=True)
class Module:
    """Base of layers and networks; see the file header."""

    def __init__(self, **attributes: Any) -> None:
        names, defaults = _annotated_names(type(self))
        unknown = sorted(set(attributes) - set(names))
        missing = sorted(set(names) - set(attributes) - defaults)
        if unknown:
            hint = nearest(unknown[0], names)
            raise TypeError(f"{type(self).__name__} has no attribute {unknown[0]!r}.{hint}")
        if missing:
            raise TypeError(f"{type(self).__name__} needs {', '.join(missing)}")
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def add_parameter(
        self,
        name: str,
        data: torch.Tensor,
        parts: Mapping[str, PartSpec] | None = None,
        *,
        keep_quantized: Callable[[Sequence[StoredPart]], int] | None = None,
    ) -> None:
        """Sets attribute `name` to `data` and lists it as a parameter.

        parts: how it is cut from a checkpoint; by default one part, read whole. keep_quantized: see ShardedParameter.
        """
        if keep_quantized is not None:
            self.__dict__.setdefault("_keepers", {})[name] = keep_quantized
        specs = dict(parts) if parts is not None else {"": PartSpec.whole(tuple(data.shape))}
        self.__dict__.setdefault("_parts", {})[name] = specs
        setattr(self, name, data)

    def defer_memory(self, name: str, allocate: Callable[[], torch.Tensor]) -> None:
        """Parameter `name` is a tensor on the meta device, without memory, until it is filled: what `allocate` gives
        (uninitialised, of the same shape and dtype) takes its place then."""
        assert getattr(self, name).is_meta, f"{name} has memory"
        self.__dict__.setdefault("_deferred", {})[name] = allocate

    def _allocate(self, name: str) -> torch.Tensor:
        data: torch.Tensor = self.__dict__["_deferred"].pop(name)()
        setattr(self, name, data)
        return data

    def drop_parameter(self, name: str) -> None:
        """Parameter `name` is one no longer; the attribute stays as it is."""
        del self.__dict__["_parts"][name]
        self.__dict__.get("_deferred", {}).pop(name, None)

    @property
    def parameters(self) -> Iterable[tuple[str, Parameter]]:
        """(dotted name, parameter) of this module and all below it, in the order of definition."""
        return [(name, Parameter(parameter.data)) for name, parameter in self.sharded_parameters()]

    def sharded_parameters(self) -> Iterator[tuple[str, ShardedParameter]]:
        """(dotted name, this rank's shard and how it is cut): what `load_weights` fills."""
        for prefix, module in self.named_modules():
            for name, parts in module.__dict__.get("_parts", {}).items():
                keeper = module.__dict__.get("_keepers", {}).get(name)
                is_deferred = name in module.__dict__.get("_deferred", {})
                allocate = partial(module._allocate, name) if is_deferred else None
                yield prefix + name, ShardedParameter(getattr(module, name), parts, keeper, allocate=allocate)

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """(prefix, module) of this module ("") and all below it ("layers.0.mlp."), each once."""
        yield from _walk("", self, set())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's parameters by name; the memory itself, not copies (see `defer_memory` for those without)."""
        return {name: parameter.data for name, parameter in self.sharded_parameters()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copies `state` (as `state_dict` gives it) into the parameters. Raises ValueError unless the names and
        shapes are exactly this module's."""
        own = dict(self.sharded_parameters())
        if own.keys() != state.keys():
            missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise ValueError(f"The state does not fit {type(self).__name__}: missing {missing}, unknown {unknown}.")
        for name, parameter in own.items():
            shape = list(parameter.data.shape)
            if shape != list(state[name].shape):
                raise ValueError(f"{name} is {list(state[name].shape)}, {type(self).__name__} has {shape}.")
            parameter.take_memory().copy_(state[name])

    def to(self, device: DeviceLike) -> Self:
        """Moves all tensors of this module and those below it: parameters (loaded ones: others may have no memory yet),
        and tables such as rope's cache."""
        target = as_torch_device(device)
        moved: dict[int, torch.Tensor] = {}
        for _, module in self.named_modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, torch.Tensor):
                    setattr(module, name, moved.setdefault(id(value), value.to(target)))
        return self


def _walk(prefix: str, value: object, seen: set[int]) -> Iterator[tuple[str, Module]]:
    if isinstance(value, Module):
        if id(value) in seen:
            return
        seen.add(id(value))
        yield prefix, value
        children: Iterable[tuple[Any, object]] = [(k, v) for k, v in vars(value).items() if not k.startswith("_")]
    elif isinstance(value, list | tuple):
        children = enumerate(value)
    elif isinstance(value, dict):
        children = value.items()
    else:
        return
    for name, child in children:
        if isinstance(child, Module | list | tuple | dict):
            yield from _walk(f"{prefix}{name}.", child, seen)


def _annotated_names(cls: type) -> tuple[list[str], set[str]]:
    """Names annotated in a class and its bases, and those of them that have a default in the class."""
    names: dict[str, None] = {}
    for base in reversed(cls.__mro__):
        for name, annotation in inspect.get_annotations(base).items():
            if "ClassVar" not in str(annotation):
                names[name] = None
    return list(names), {name for name in names if hasattr(cls, name)}

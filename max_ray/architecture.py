"""SupportedArchitecture: what one model family is and can do, as data. The registry finds it, the factory builds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from max_ray.errors import ConfigError
from max_ray.interfaces import (
    KVCacheStrategy,
    PipelineTask,
    RopeType,
    SupportedEncoding,
    TextContext,
    WeightsFormat,
)

if TYPE_CHECKING:
    from max_ray.modeling import PipelineModel

Encodings = Mapping[SupportedEncoding, Sequence[KVCacheStrategy]]


@dataclass(frozen=True, kw_only=True, eq=False)
class SupportedArchitecture:
    """One model family for one task. Two records are equal only when they are the same object.

    | field                               | who uses it, and for what                                             |
    |-------------------------------------|-----------------------------------------------------------------------|
    | name, task                          | registry: the key; the name is the class name in config.json          |
    | example_repo_ids                    | `max-ray list`; informative                                           |
    | default_encoding                    | plan: where neither the user nor the checkpoint says one              |
    | supported_encodings                 | plan; a dict of encoding -> cache strategies, or a set of encodings   |
    | pipeline_model                      | factory: the PipelineModel class that every rank builds               |
    | tokenizer                           | factory: the tokenizer class                                          |
    | default_weights_format              | plan: the format of a folder of weights                               |
    | weight_adapters                     | factory: handed to the pipeline_model, by the checkpoint's format     |
    | context_type                        | registry: `retrieve_context_type`                                     |
    | config                              | informative: the family's own model configuration class               |
    | rope_type                           | informative: order of rotated pairs in the family's GGUF files        |
    | multi_gpu_supported                 | plan: may tensor_parallel_size exceed 1                               |
    | required_arguments                  | plan: setting -> value that the family needs                          |
    | context_validators                  | tokenizer: each is called with a new context, raises InputError       |
    | supports_empty_batches              | informative, MAX's name: no executor here runs an empty batch         |
    | requires_max_batch_context_length   | informative, MAX's name: batches here are bounded by KV blocks        |
    """

    name: str
    task: PipelineTask
    default_encoding: SupportedEncoding
    supported_encodings: Encodings
    pipeline_model: type[PipelineModel]
    tokenizer: type[Any]
    default_weights_format: WeightsFormat = WeightsFormat.safetensors
    example_repo_ids: Sequence[str] = ()
    context_type: type[Any] = TextContext
    config: type[Any] | None = None
    rope_type: RopeType = RopeType.none
    weight_adapters: Mapping[WeightsFormat, Callable[..., Any]] = field(default_factory=dict)
    multi_gpu_supported: bool = False
    required_arguments: Mapping[str, Any] = field(default_factory=dict)
    context_validators: Sequence[Callable[[Any], None]] = ()
    supports_empty_batches: bool = False
    requires_max_batch_context_length: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "supported_encodings", _as_mapping(self.supported_encodings))
        if self.default_encoding not in self.supported_encodings:
            raise ConfigError(
                f"{self.name}: default_encoding={self.default_encoding.value} is not in supported_encodings "
                f"({_names(self.supported_encodings)})."
            )
        if self.required_arguments:
            self._check_required_arguments()

    def _check_required_arguments(self) -> None:
        from max_ray.config import PipelineConfig

        unknown = sorted(set(self.required_arguments) - set(PipelineConfig.model_fields))
        if unknown:
            raise ConfigError(f"{self.name}: required_arguments names settings that do not exist: {unknown}.")

    @property
    def tokenizer_cls(self) -> type[Any]:
        """MAX's second name of `tokenizer`."""
        return self.tokenizer


def _as_mapping(encodings: Encodings | Iterable[SupportedEncoding]) -> dict[SupportedEncoding, list[KVCacheStrategy]]:
    """Also takes the set of MAX's later versions; the only cache strategy is the paged one."""
    if isinstance(encodings, Mapping):
        return {encoding: list(strategies) for encoding, strategies in encodings.items()}
    return {encoding: [KVCacheStrategy.PAGED] for encoding in encodings}


def _names(encodings: Iterable[SupportedEncoding]) -> str:
    return ", ".join(sorted(encoding.value for encoding in encodings))


def _kinds(value: object) -> str:
    """What stands where a list of records should: a record's own repr is pages long."""
    if isinstance(value, SupportedArchitecture):
        return f"the record {value.name} itself"
    return f"{value!r:.80}" if not isinstance(value, (list, tuple)) else f"[{', '.join(map(_kinds, value)):.80}]"


def list_of_records(module: object, what: str, attribute: str = "ARCHITECTURES") -> list[SupportedArchitecture]:
    """`module.ARCHITECTURES`, checked. Raises ConfigError that begins with `what`."""
    records = getattr(module, attribute, None)
    if records is None:
        raise ConfigError(f"{what} has no list {attribute}: its __init__.py must define {attribute} = [my_arch].")
    if not isinstance(records, (list, tuple)) or not all(isinstance(r, SupportedArchitecture) for r in records):
        raise ConfigError(
            f"{what}: {attribute} must be a list of SupportedArchitecture records, not {_kinds(records)}."
        )
    if not records:
        raise ConfigError(f"{what}: {attribute} is empty.")
    return list(records)

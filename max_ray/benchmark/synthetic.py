"""A runner over random weights: the product's own model, cache and runner, with no checkpoint and no settings file.

The names and shapes of the weights are those that `transformers` gives the same config.json, so any registered family
can be measured. One rank.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from max_ray.distributed import TPGroup
from max_ray.engine.graphs import decode_graphs
from max_ray.engine.kv_storage import KVStorage
from max_ray.engine.runner import ModelRunner
from max_ray.errors import ConfigError
from max_ray.huggingface import HuggingFaceConfig
from max_ray.interfaces import RunRequest, RunRow, SamplingParams, SupportedEncoding
from max_ray.modeling import PipelineModel
from max_ray.nn import Module, pack_weights
from max_ray.weights.source import WeightSource, no_such_tensor

PAGE_SIZE = 16
_SCALE = 0.02  # of weights; norms are around 1


@dataclass(frozen=True)
class RunSettings:
    """The settings of PipelineConfig that a model reads; pydantic is not needed for them."""

    max_length: int
    kv_cache_page_size: int = PAGE_SIZE
    tensor_parallel_size: int = 1
    expert_parallel: bool = False


def transformers_model(config: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> Any:
    """Hugging Face's model of a config.json, weights as its class makes them. Raises ConfigError."""
    values = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    try:
        theirs = AutoConfig.for_model(config["model_type"], **values)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"transformers knows no model of this shape: {error}.") from None
    with torch.device(device):
        return cast(Any, AutoModelForCausalLM).from_config(theirs, dtype=dtype).eval()


class RandomWeights(WeightSource):
    """Normal random numbers in place of a checkpoint, made on the device when they are asked for; the same name has
    the same numbers on one kind of device."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        theirs = transformers_model(config, dtype, "meta")
        tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
        self._shapes = {name: tuple(x.shape) for name, x in theirs.state_dict().items() if name not in tied}
        self._dtype, self._device = dtype, device

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise no_such_tensor(name, self._shapes)
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        self.shape(name)
        return self._dtype

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        shape = self.shape(name)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        values = torch.empty(shape, dtype=self._dtype, device=self._device).normal_(0, _SCALE, generator=generator)
        return (values + 1 if len(shape) == 1 else values).narrow(axis, start, stop - start)


def build_runner(
    config: dict[str, Any],
    family: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    max_rows: int,
    max_length: int,
    num_blocks: int,
) -> ModelRunner:
    """The runner of one rank for batches of `max_rows` sequences of `max_length` tokens; its cache holds random keys.

    family: a module with ARCHITECTURES. Raises ConfigError where it has no model of this name.
    """
    names = config.get("architectures") or []
    records = getattr(import_module(family), "ARCHITECTURES", [])
    record = next((r for r in records if r.name in names or r.pipeline_model.covers(config)), None)
    if record is None:
        raise ConfigError(f"{family} has no architecture {' / '.join(names) or '(the shape names none)'}.")
    settings, theirs = RunSettings(max_length), HuggingFaceConfig(config)
    encoding = SupportedEncoding(str(dtype).removeprefix("torch."))
    model: PipelineModel = record.pipeline_model(
        cast(Any, settings),
        theirs,
        encoding,
        device,
        TPGroup.single(device),
        RandomWeights(config, dtype, device),
        record.weight_adapters.get(record.default_weights_format),
    )
    for network in vars(model).values():
        if isinstance(network, Module):
            pack_weights(network)
    params = model.get_kv_params(cast(Any, settings), theirs, encoding)
    storage = KVStorage.allocate(params, num_blocks, device)
    for cache in (*storage.keys, *storage.values):
        cache.normal_()
    graphs = decode_graphs(model, storage, max_rows, max_length)
    return ModelRunner(model, storage, TPGroup.single(device), config["vocab_size"], graphs)


def blocks_for(tokens: int) -> int:
    """Blocks of a sequence of so many tokens."""
    return -(-tokens // PAGE_SIZE)


def run_request(rows: int, cached: int, new: int, num_steps: int, vocab_size: int) -> RunRequest:
    """`rows` sequences with `cached` tokens in the cache and `new` random ones to run, then `num_steps` greedy ones."""
    width = blocks_for(cached + new + num_steps)
    tables = np.random.default_rng(0).permutation(rows * width).astype(np.int32).reshape(rows, width)
    tokens = np.random.default_rng(1).integers(0, vocab_size, (rows, new))
    return RunRequest(
        run_id=1,
        num_steps=num_steps,
        rows=[
            RunRow(
                request_id=str(row),
                active_tokens=tokens[row],
                processed_length=cached,
                block_table=tables[row],
                max_new_tokens=num_steps,
                sampling_params=SamplingParams(temperature=0.0, seed=row),
                stop_ids=frozenset(),
                generated_length=0,
                prompt_length=cached + new,
            )
            for row in range(rows)
        ],
    )

"""NetworkModel: the PipelineModel of a family that gives its numbers, its network and its weight names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from max_ray.modeling import PipelineModel
from max_ray.modeling.packed_loading import load_network
from max_ray.nn.module import Module
from max_ray.weights.mapping import NameMap

if TYPE_CHECKING:
    from max_ray.config import PipelineConfig
    from max_ray.distributed import TPGroup
    from max_ray.weights.source import WeightSource

ConfigT = TypeVar("ConfigT", covariant=True)


class NetworkModel(PipelineModel, Generic[ConfigT]):
    """One rank. Raises ConfigError for a config.json that the family does not cover and ParallelismError for ranks that
    cannot cut it, both before loading; WeightsError for a checkpoint that is not what config.json says."""

    network: Module

    def __init__(
        self,
        pipeline_config: PipelineConfig,
        huggingface_config: Any,
        encoding: Any,
        device: torch.device,
        tp: TPGroup,
        weights: WeightSource,
        adapter: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(pipeline_config, huggingface_config, encoding, device, tp, weights, adapter)
        self.check_tensor_parallel(huggingface_config, tp.size)
        self.check_settings(pipeline_config, huggingface_config)
        max_length = self.calculate_max_seq_len(pipeline_config, huggingface_config)
        self.network = self.build_network(max_length, getattr(torch, encoding.cache_dtype))
        name_map = (adapter or self.weight_names)(huggingface_config)
        self.check_weights(weights, name_map)
        load_network(self.network, weights, name_map)
        del self.weights  # nothing reads the checkpoint again

    @classmethod
    @abstractmethod
    def config_of(cls, huggingface_config: Any) -> ConfigT:
        """The family's own configuration. Raises ConfigError for a value that it does not cover."""

    @staticmethod
    @abstractmethod
    def weight_names(huggingface_config: Any) -> NameMap:
        """The table from the checkpoint's names to the network's, where the record has no adapter for the format."""

    def check_weights(self, weights: WeightSource, name_map: NameMap) -> None:
        """Raises WeightsError for what is wrong with a checkpoint beside its names and shapes. Called before loading,
        with the network built."""

    @abstractmethod
    def build_network(self, max_length: int, dtype: torch.dtype) -> Module:
        """This rank's network, its weights not loaded yet."""

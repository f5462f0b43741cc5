"""TransformersAdapterModel: any causal language model of the installed `transformers`, as the pipeline sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from architectures.transformers_adapter.attention import PROBING
from architectures.transformers_adapter.check import check_tokenwise
from architectures.transformers_adapter.class_names import class_names
from architectures.transformers_adapter.model_config import AdapterConfig, class_of
from architectures.transformers_adapter.skeleton import build_skeleton, network_config
from architectures.transformers_adapter.tensor_parallel import TensorParallelPlan, cut_axis
from architectures.transformers_adapter.text_parts import text_network
from architectures.transformers_adapter.transformers_adapter import TransformersNetwork
from architectures.transformers_adapter.weight_adapters import NetworkSource
from max_ray.errors import ConfigError
from max_ray.huggingface import required
from max_ray.interfaces import KVCacheInputs, KVCacheParams, ModelInputs, RunRow
from max_ray.modeling import TextPipelineModel
from max_ray.weights.load import load_weights

if TYPE_CHECKING:
    from max_ray.config import PipelineConfig
    from max_ray.distributed import TPGroup
    from max_ray.weights.source import WeightSource


class TransformersAdapterModel(TextPipelineModel):
    """One rank. Raises ConfigError with the reason for a network that the adapter cannot run (before loading, but for
    what `check_tokenwise` finds), WeightsError for a checkpoint that is not the network's."""

    network: TransformersNetwork

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
        config = AdapterConfig.from_huggingface(huggingface_config)
        of_transformers = network_config(huggingface_config.to_dict())
        dtype = getattr(torch, encoding.cache_dtype)
        skeleton = build_skeleton(config.class_name, of_transformers, dtype, PROBING)
        source = NetworkSource(weights, skeleton)
        untied = source.resolve_ties()
        self.network = TransformersNetwork(config, of_transformers, tp, dtype, source.names(), untied)
        for name, parameter in self.network.sharded_parameters():
            if "0" in parameter.parts:
                source.split_in_halves(name, cut_axis("packed_colwise", parameter.data.dim()))
        load_weights(self.network.sharded_parameters(), source, source.name_map())
        max_length = self.calculate_max_seq_len(pipeline_config, huggingface_config)
        check_tokenwise(self.network, config.class_name, required(huggingface_config, "vocab_size"), max_length)
        del self.weights  # nothing reads the checkpoint again

    @classmethod
    def covers(cls, huggingface_config: Mapping[str, Any]) -> bool:
        """Whether the installed `transformers` has a causal language model of that name."""
        return class_of(huggingface_config) is not None

    @classmethod
    def class_names(cls, huggingface_config: Mapping[str, Any]) -> Sequence[str]:
        """See PipelineModel; those of `transformers`."""
        return class_names(huggingface_config)

    @classmethod
    def text_network(cls, huggingface_config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """See PipelineModel."""
        return text_network(huggingface_config)

    @classmethod
    def calculate_max_seq_len(cls, pipeline_config: PipelineConfig, huggingface_config: Any) -> int:
        """`max_length` of the configuration, by default and at most the length that the network was made for."""
        config = AdapterConfig.from_huggingface(huggingface_config)
        wanted: int | None = pipeline_config.max_length
        if wanted is None and config.max_length is None:
            raise ConfigError(
                f"config.json of {config.class_name} does not say how long a text may be: set max_length."
            )
        if wanted is not None and config.max_length is not None and wanted > config.max_length:
            raise ConfigError(
                f"max_length={wanted} exceeds what {config.class_name} supports through transformers' code: "
                f"{config.max_length} tokens. Use max_length={config.max_length} or less."
            )
        length = wanted or config.max_length
        assert length is not None, "one of the two is given"
        return length

    @classmethod
    def get_kv_params(
        cls, pipeline_config: PipelineConfig, huggingface_config: Any, encoding: Any, tp_size: int = 1
    ) -> KVCacheParams:
        """A layer of the cache for each attention call of a forward pass, as wide as the widest head. The heads are cut
        over the ranks where the network's plan cuts them."""
        config = AdapterConfig.from_huggingface(huggingface_config)
        cut = tp_size > 1 and cls._cuts_heads(huggingface_config)
        return KVCacheParams(
            dtype=encoding.cache_dtype,
            num_layers=len(config.calls),
            num_kv_heads=config.num_kv_heads // tp_size if cut else config.num_kv_heads,
            head_dim=config.head_dim,
            page_size=pipeline_config.kv_cache_page_size,
        )

    @classmethod
    def check_tensor_parallel(cls, huggingface_config: Any, tp_size: int) -> None:
        """Raises ParallelismError where the network has no plan of its own, or one that `tp_size` ranks cannot carry
        out."""
        config = AdapterConfig.from_huggingface(huggingface_config)
        if tp_size > 1:
            skeleton = cls._skeleton(huggingface_config)
            TensorParallelPlan(dict(config.tp_plan)).check(config.class_name, skeleton, config.calls, tp_size)

    @classmethod
    def prefix_is_reusable(cls, pipeline_config: PipelineConfig, huggingface_config: Any) -> bool:
        """Networks whose keys depend on more than the tokens before them are refused (see check.py), but for those
        whose rope depends on the length of the whole prompt."""
        length = AdapterConfig.from_huggingface(huggingface_config).rope_length
        return length is None or cls.calculate_max_seq_len(pipeline_config, huggingface_config) <= length

    @classmethod
    def _cuts_heads(cls, huggingface_config: Any) -> bool:
        config = AdapterConfig.from_huggingface(huggingface_config)
        plan, skeleton = TensorParallelPlan(dict(config.tp_plan)), cls._skeleton(huggingface_config)
        return all(plan.cuts_heads(skeleton, call) for call in config.calls)

    @classmethod
    def _skeleton(cls, huggingface_config: Any) -> Any:
        config = AdapterConfig.from_huggingface(huggingface_config)
        return build_skeleton(config.class_name, network_config(huggingface_config.to_dict()), torch.float32, PROBING)

    def prepare_initial_token_inputs(
        self,
        context_batch: Sequence[RunRow],
        kv_cache_inputs: KVCacheInputs | None = None,
        return_n_logits: int = 1,
    ) -> ModelInputs:
        """See TextPipelineModel; with `rope_lengths` where the rope depends on the length of the sequence."""
        inputs = super().prepare_initial_token_inputs(context_batch, kv_cache_inputs, return_n_logits)
        if AdapterConfig.from_huggingface(self.huggingface_config).rope_length is None:
            return inputs
        return self.with_rope_lengths(inputs, context_batch)

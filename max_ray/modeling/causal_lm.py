"""CausalLMModel: the PipelineModel of a decoder-only family that gives its numbers, its network and its weight names.

class MyModel(CausalLMModel):
    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> MyConfig:
        return MyConfig.from_huggingface(huggingface_config)

    def build_network(self, max_length: int, dtype: torch.dtype) -> MyNetwork:
        return MyNetwork(self.config_of(self.huggingface_config), max_length, self.tp, dtype)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from max_ray.errors import ConfigError, ParallelismError, WeightsError
from max_ray.interfaces import KVCacheInputs, KVCacheParams, ModelInputs, RunRow
from max_ray.modeling.network_model import NetworkModel
from max_ray.modeling.text_pipeline_model import TextPipelineModel, check_cut
from max_ray.nn.embedding import ParallelLMHead
from max_ray.nn.rope import RopeConfig
from max_ray.weights.mapping import NameMap, OwnName

if TYPE_CHECKING:
    from max_ray.config import PipelineConfig
    from max_ray.weights.source import WeightSource

_HEAD = "lm_head.weight"
_ROWS = 8192  # compared at a time


class DecoderConfig(Protocol):
    """What a family's own configuration class tells CausalLMModel. Counts are of the whole model.

    widths: sizes that the ranks must divide, by their names in config.json (the feed-forward width, for most).
    """

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rope(self) -> RopeConfig: ...
    @property
    def widths(self) -> Mapping[str, int]: ...


class CausalLMModel(NetworkModel[DecoderConfig], TextPipelineModel):
    """A NetworkModel of a decoder-only network.

    A layer that has an attribute `waits_for_device`, and it is true, keeps decode steps out of CUDA graphs.

    The network is called as network(batch) -> logits [N, V] with a ForwardBatch.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._by_length = self.rope_config(self.huggingface_config).depends_on_length
        waits = any(getattr(module, "waits_for_device", False) for _, module in self.network.named_modules())
        self.decode_is_capturable = not waits and not self._by_length

    @classmethod
    def get_kv_params(
        cls, pipeline_config: PipelineConfig, huggingface_config: Any, encoding: Any, tp_size: int = 1
    ) -> KVCacheParams:
        """Keys and values of `num_kv_heads`, replicated where they are fewer than the ranks."""
        config = cls.config_of(huggingface_config)
        return KVCacheParams(
            dtype=encoding.cache_dtype,
            num_layers=config.num_layers,
            num_kv_heads=max(1, config.num_kv_heads // tp_size),
            head_dim=config.head_dim,
            page_size=pipeline_config.kv_cache_page_size,
        )

    @classmethod
    def check_tensor_parallel(cls, huggingface_config: Any, tp_size: int) -> None:
        """See `check_cut`."""
        config = cls.config_of(huggingface_config)
        check_cut(tp_size, config.num_heads, config.num_kv_heads, config.widths)

    @classmethod
    def num_experts(cls, huggingface_config: Any) -> int:
        """Experts of a layer that expert parallelism can spread over the ranks; 0 where there are none."""
        return 0

    @classmethod
    def check_settings(cls, pipeline_config: PipelineConfig, huggingface_config: Any) -> None:
        """See PipelineModel and `check_direction`; ParallelismError where the ranks do not divide the experts."""
        cls.check_direction(huggingface_config)
        num_experts, size = cls.num_experts(huggingface_config), pipeline_config.tensor_parallel_size
        if not num_experts:
            super().check_settings(pipeline_config, huggingface_config)
        elif pipeline_config.expert_parallel and num_experts % size:
            raise ParallelismError(
                f"expert_parallel=True: {num_experts} experts cannot be spread evenly over tensor_parallel_size={size}."
                f" Leave expert_parallel out, or take a size that divides {num_experts}."
            )

    @classmethod
    def check_direction(cls, huggingface_config: Any) -> None:
        """Raises ConfigError for a decoder that was made an encoder (`is_causal` of transformers): its tokens see later
        ones, which a cache cannot have."""
        for part in (huggingface_config, huggingface_config.get("text_config") or {}):
            if part.get("is_causal") is False:
                raise ConfigError("config.json: is_causal=false: tokens that see later tokens are not supported.")

    def check_weights(self, weights: WeightSource, name_map: NameMap) -> None:
        """A tied checkpoint may carry its embedding again as its head, but no head with numbers of its own."""
        embedding = name_map.checkpoint_name(OwnName("embed_tokens.weight"))
        is_head = isinstance(getattr(self.network, "lm_head", None), ParallelLMHead)
        if not is_head or embedding is None or _HEAD not in name_map.rename([_HEAD]).dropped:
            return
        if {embedding, _HEAD} <= set(weights.names()) and not _are_equal(weights, embedding, _HEAD):
            raise WeightsError(
                f"config.json says tie_word_embeddings=true, but the checkpoint has a head of its own: {_HEAD} is not "
                f"{embedding}. Set tie_word_embeddings to false to use it, or take it out of the checkpoint."
            )

    @classmethod
    def rope_config(cls, huggingface_config: Any) -> RopeConfig:
        return cls.config_of(huggingface_config).rope

    def prepare_initial_token_inputs(
        self,
        context_batch: Sequence[RunRow],
        kv_cache_inputs: KVCacheInputs | None = None,
        return_n_logits: int = 1,
    ) -> ModelInputs:
        """See TextPipelineModel; with `rope_lengths` where the rope depends on the length of the sequence."""
        inputs = super().prepare_initial_token_inputs(context_batch, kv_cache_inputs, return_n_logits)
        return self.with_rope_lengths(inputs, context_batch) if self._by_length else inputs


def _are_equal(weights: WeightSource, a: str, b: str) -> bool:
    """Whether two matrices hold the same numbers; some rows at a time."""
    num_rows = weights.shape(a)[0]

    def rows(name: str, start: int) -> torch.Tensor:
        return weights.get_slice(name, 0, start, min(start + _ROWS, num_rows)).float()

    return weights.shape(a) == weights.shape(b) and all(
        torch.equal(rows(a, start), rows(b, start)) for start in range(0, num_rows, _ROWS)
    )

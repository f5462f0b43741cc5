"""PipelineModel: what a model family must provide."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from max_ray.errors import ConfigError
from max_ray.interfaces.executor import RunRow
from max_ray.interfaces.kv_cache import KVCacheParams
from max_ray.interfaces.model_inputs import KVCacheInputs, ModelInputs, ModelOutputs

if TYPE_CHECKING:
    import torch

    from max_ray.config import PipelineConfig
    from max_ray.distributed.group import TPGroup
    from max_ray.modeling.score_layers import ScoreLayers
    from max_ray.weights.source import WeightSource


class PipelineModel(ABC):
    """One model family on one rank: loads the weights in `__init__`, then runs batches.

    huggingface_config: config.json as an attribute-style mapping (`cfg.hidden_size`, `cfg.get("head_dim")`).
    encoding: a SupportedEncoding that the architecture lists. weights: lazily read tensors of the checkpoint.
    adapter: the record's weight adapter for this checkpoint format, or None.

    decode_is_capturable: whether a decode step may be captured in a CUDA graph: `execute` never waits for the device,
    and `prepare_next_token_inputs` reads nothing of `prev_model_inputs` but the `kv_cache_inputs`.
    takes_images: whether prompts may have images, and so positions other than indices.
    """

    decode_is_capturable = False
    takes_images = False

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
        self.pipeline_config = pipeline_config
        self.huggingface_config = huggingface_config
        self.encoding = encoding
        self.device = device
        self.tp = tp
        self.weights = weights
        self.adapter = adapter

    @classmethod
    def covers(cls, huggingface_config: Any) -> bool:
        """Of a family that serves for names other than its record's (the registry's fallback): whether it knows the
        model. False for all others."""
        return False

    @classmethod
    def class_names(cls, huggingface_config: Any) -> Sequence[str]:
        """Of the registry's fallback: the class names that a config.json means whose own names are not known, as those
        of base classes, or which has none. The most likely one first; none of all others."""
        return ()

    @classmethod
    def text_network(cls, huggingface_config: Any) -> Mapping[str, Any] | None:
        """Of the registry's fallback: config.json of the text network of a multimodal model, where it can be served
        without the rest. Its `text_part_of` names the class of the whole. None for all others."""
        return None

    @classmethod
    @abstractmethod
    def calculate_max_seq_len(cls, pipeline_config: PipelineConfig, huggingface_config: Any) -> int:
        """The longest sequence (prompt + generated) this model supports under this configuration."""

    @classmethod
    def get_kv_params(
        cls, pipeline_config: PipelineConfig, huggingface_config: Any, encoding: Any, tp_size: int = 1
    ) -> KVCacheParams:
        """Cache shape of one rank. Default: grouped-query attention by config.json's usual names; fewer KV heads
        than ranks are replicated."""
        cfg = huggingface_config
        num_kv_heads = cfg.get("num_key_value_heads") or cfg.num_attention_heads
        return KVCacheParams(
            dtype=encoding.cache_dtype,
            num_layers=cfg.num_hidden_layers,
            num_kv_heads=max(1, num_kv_heads // tp_size),
            head_dim=cfg.get("head_dim") or cfg.hidden_size // cfg.num_attention_heads,
            page_size=pipeline_config.kv_cache_page_size,
        )

    @classmethod
    def check_tensor_parallel(cls, huggingface_config: Any, tp_size: int) -> None:
        """Raises ParallelismError where the network cannot be cut into `tp_size` ranks. Called before loading."""

    @classmethod
    def check_settings(cls, pipeline_config: PipelineConfig, huggingface_config: Any) -> None:
        """Raises ConfigError for a setting that this family cannot honour. Called before loading."""
        if pipeline_config.expert_parallel:
            raise ConfigError(
                "expert_parallel=True: this family has no experts that can be spread over devices. Leave it out."
            )

    @classmethod
    def default_pooling(cls) -> str:
        """Of the embeddings task: how token vectors become a text's where the model's files do not say (a name of
        `max_ray.sentence_files.POOLING_MODES`)."""
        return "mean"

    @classmethod
    def score_layers(cls, huggingface_config: Any) -> ScoreLayers:
        """Of the task of scores: what makes a score of the hidden states. Raises ConfigError for another head."""
        raise AssertionError(f"{cls.__name__} is for another task")

    @classmethod
    def prefix_is_reusable(cls, pipeline_config: PipelineConfig, huggingface_config: Any) -> bool:
        """Whether keys and values depend on nothing but the tokens up to their own, so that prompts may share them."""
        return True

    @abstractmethod
    def execute(self, model_inputs: ModelInputs) -> ModelOutputs:
        """Runs one forward pass; writes the new keys and values into the cache."""

    @abstractmethod
    def prepare_initial_token_inputs(
        self,
        context_batch: Sequence[RunRow],
        kv_cache_inputs: KVCacheInputs | None = None,
        return_n_logits: int = 1,
    ) -> ModelInputs:
        """Inputs of the first step: ragged prompts, chunks and single tokens. Logits are wanted for each row's last
        `row.num_logits` tokens (`return_n_logits` where a context does not say)."""

    @abstractmethod
    def prepare_next_token_inputs(self, next_tokens: torch.Tensor, prev_model_inputs: ModelInputs) -> ModelInputs:
        """Inputs of a following step: one token a row (int64 [B], on the device), rows as in `prev_model_inputs`,
        whose `kv_cache_inputs` the caller has already advanced to the new step."""

"""Llama3Model: the Llama network as the pipeline sees it: loads one rank's shard, then runs batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from architectures.llama3.llama3 import Llama3
from architectures.llama3.model_config import Llama3Config
from architectures.llama3.weight_adapters import safetensors_name_map
from max_ray.interfaces import KVCacheInputs, ModelInputs, ModelOutputs, RunRow
from max_ray.nn import TextPipelineModel
from max_ray.weights.load import load_weights

if TYPE_CHECKING:
    from max_ray.config import PipelineConfig
    from max_ray.distributed import TPGroup
    from max_ray.weights.source import WeightSource


@dataclass
class Llama3Inputs(ModelInputs):
    """rope_lengths: int64 [T], for checkpoints whose rope depends on the sequence length (rope_type "dynamic")."""

    rope_lengths: torch.Tensor | None = None


class Llama3Model(TextPipelineModel):
    """One rank of a Llama. Raises WeightsError when the checkpoint is not what config.json says."""

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
        config = Llama3Config.from_huggingface(huggingface_config)
        self.check_tensor_parallel(huggingface_config, tp.size)
        max_length = self.calculate_max_seq_len(pipeline_config, huggingface_config)
        self.network = Llama3(config, max_length, tp, getattr(torch, encoding.cache_dtype))
        name_map = (adapter or safetensors_name_map)(huggingface_config)
        load_weights(self.network.sharded_parameters(), weights, name_map)
        self.decode_is_capturable = not self.network.rotary.is_dynamic
        del self.weights  # nothing reads the checkpoint again

    def execute(self, model_inputs: ModelInputs) -> ModelOutputs:
        kv = model_inputs.kv_cache_inputs
        assert kv is not None, "a Llama runs with a KV cache"
        with torch.inference_mode():
            logits = self.network(
                model_inputs.tokens,
                model_inputs.positions,
                model_inputs.qo_indptr,
                model_inputs.logit_indices,
                kv,
                getattr(model_inputs, "rope_lengths", None),
            )
        return ModelOutputs(logits=logits)

    def prepare_initial_token_inputs(
        self,
        context_batch: Sequence[RunRow],
        kv_cache_inputs: KVCacheInputs | None = None,
        return_n_logits: int = 1,
    ) -> ModelInputs:
        inputs = super().prepare_initial_token_inputs(context_batch, kv_cache_inputs, return_n_logits)
        if not self.network.rotary.is_dynamic:
            return inputs
        prompts = np.array([row.prompt_length for row in context_batch], dtype=np.int64)
        counts = [len(row.active_tokens) for row in context_batch]
        prompt_lengths = self._to_device(np.repeat(prompts, counts))
        lengths = torch.maximum(inputs.positions + 1, prompt_lengths)  # following steps: the default, position + 1
        return Llama3Inputs(**vars(inputs), rope_lengths=lengths)

"""Does the model fit? Makes the memory plan, shortens a default length, refuses what cannot start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from max_ray.config import PipelineConfig
from max_ray.errors import ConfigError, DoesNotFitError
from max_ray.huggingface import HuggingFaceConfig
from max_ray.interfaces import KVCacheParams, SupportedEncoding, WeightsFormat
from max_ray.planning.encoding import stored_encoding, usable_encodings
from max_ray.planning.hardware import GIB, Hardware
from max_ray.planning.memory_plan import MemoryPlan, plan_memory
from max_ray.planning.suggestions import Changes, nearest_settings
from max_ray.planning.weight_sizes import weight_sizes
from max_ray.registry import SupportedArchitecture

CPU_BATCH_SIZE = 64
GPU_BATCH_SIZE = 256
TYPICAL_LENGTH = 512
"""Tokens of a request by which the default of max_batch_size is chosen: no more such than the KV cache holds."""
_BITS = {
    **{"float32": 32.0, "bfloat16": 16.0, "float16": 16.0},
    **{"q8_0": 8.5, "q6_k": 6.6, "q5_k": 5.6, "q4_k": 4.6, "q4_1": 5.0, "q4_0": 4.5},
}


@dataclass(frozen=True)
class ModelFacts:
    """What a memory plan is made from, beside the settings."""

    model_path: Path
    weights_format: WeightsFormat
    architecture: SupportedArchitecture
    hf_config: HuggingFaceConfig
    device: str
    hardware: Hardware

    def kv_params(self, config: PipelineConfig, encoding: SupportedEncoding) -> KVCacheParams:
        model = self.architecture.pipeline_model
        return model.get_kv_params(config, self.hf_config, encoding, config.tensor_parallel_size)

    def memory(self, config: PipelineConfig, encoding: SupportedEncoding, max_length: int | None = None) -> MemoryPlan:
        """The plan under these settings, fitting or not. Raises ConfigError where they cannot be."""
        model, ranks = self.architecture.pipeline_model, config.tensor_parallel_size
        if ranks > 1:
            model.check_tensor_parallel(self.hf_config, ranks)
        params = self.kv_params(config, encoding)
        sizes = weight_sizes(
            self.model_path,
            self.weights_format,
            self.architecture,
            self.hf_config,
            encoding,
            ranks,
            params.num_kv_heads,
            config.expert_parallel,
        )
        length = max_length or model.calculate_max_seq_len(config, self.hf_config)

        def plan(batch: int) -> MemoryPlan:
            return plan_memory(config, self.hf_config, params, sizes, self.device, self.hardware, length, batch)

        if config.max_batch_size is not None:
            return plan(config.max_batch_size)
        most = plan(self.largest_default_batch)
        if not most.has_cache or (most.capacity is None and config.kv_cache_memory is None):
            return most
        useful = max(1, -(-most.num_blocks // most.blocks_a_request(min(TYPICAL_LENGTH, length))))
        return most if useful >= most.max_batch_size else plan(useful)

    @property
    def largest_default_batch(self) -> int:
        """The default max_batch_size, where the KV cache is no limit."""
        return GPU_BATCH_SIZE if self.device == "cuda" else CPU_BATCH_SIZE


def fit_memory(
    config: PipelineConfig, facts: ModelFacts, encoding: SupportedEncoding, origins: dict[str, str]
) -> MemoryPlan:
    """The plan that the model starts with; origins get `max_length`, `max_batch_size` and `kv_cache_blocks`.

    Raises DoesNotFitError with the table of the plan and settings that fit; ConfigError for a cache that is too small
    for one request.
    """
    origins["max_length"] = "given" if config.max_length is not None else "model: config.json"
    plan = facts.memory(config, encoding)
    held = plan.num_blocks * plan.page_size
    if not plan.has_cache:
        _check_no_cache_settings(config, origins)
    elif config.kv_cache_memory is not None and held < plan.max_length:
        plan = _shortened_to_cache(config, facts, encoding, plan, origins)
    elif config.max_length is None and held < plan.max_length and held >= 2:
        origins["max_length"] = f"hardware: the KV cache holds {held} tokens"
        plan = facts.memory(config, encoding, held)
    origins["max_batch_size"] = _batch_origin(config, facts, plan)
    origins.setdefault("kv_cache_blocks", plan.cache_origin)
    if plan.shortage:
        raise DoesNotFitError(_refusal(config, facts, encoding, plan))
    return plan


def _batch_origin(config: PipelineConfig, facts: ModelFacts, plan: MemoryPlan) -> str:
    if config.max_batch_size is not None:
        return "given"
    if plan.max_batch_size == facts.largest_default_batch:
        return f"default for {facts.device}"
    return f"hardware: requests of {min(TYPICAL_LENGTH, plan.max_length)} tokens that the KV cache holds"


def _check_no_cache_settings(config: PipelineConfig, origins: dict[str, str]) -> None:
    origins["kv_cache_blocks"] = "task: embeddings keep no keys and values"
    if config.kv_cache_memory is not None:
        raise ConfigError("kv_cache_memory has no meaning for embeddings, which keep no KV cache: leave it out.")


def _shortened_to_cache(
    config: PipelineConfig, facts: ModelFacts, encoding: SupportedEncoding, plan: MemoryPlan, origins: dict[str, str]
) -> MemoryPlan:
    """A cache of a given size that holds less than one request of the model's length."""
    held = plan.num_blocks * plan.page_size
    if config.max_length is None and held >= 2:
        origins["max_length"] = f"hardware: the KV cache holds {held} tokens"
        return facts.memory(config, encoding, held)
    needed = plan.blocks_a_request(plan.max_length) * plan.page_size
    raise ConfigError(
        f"The KV cache budget of {config.kv_cache_memory:.3f} GiB a rank holds {held} tokens, and one request of "
        f"max_length={plan.max_length} needs {needed}. Set --max-length {max(held, 1)} "
        f"or --kv-cache-memory {needed * plan.kv_bytes_per_token / GIB + 0.001:.3f}."
    )


def _refusal(config: PipelineConfig, facts: ModelFacts, encoding: SupportedEncoding, plan: MemoryPlan) -> str:
    def replan(changes: Changes) -> MemoryPlan:
        changed = config.replace(**changes)
        return facts.memory(changed, SupportedEncoding(changed.quantization_encoding or encoding))

    usable = usable_encodings(facts.architecture, stored_encoding(facts.hf_config))
    smaller = [e for e in usable if _BITS.get(e.value, 16.0) < _BITS.get(encoding.value, 16.0)]
    found = nearest_settings(config, plan, smaller, facts.hardware.num_gpus, replan)
    shown = "\n".join(f"  {flags}" for flags in found) or "  none: this machine is too small for the model"
    needed = replace(plan, num_blocks=max(plan.num_blocks, plan.blocks_a_request(plan.max_length)))
    missing = f"The model does not fit: {plan.shortage / GIB:.2f} GiB a rank are missing."
    return "\n".join([missing, needed.text(), "Settings that fit:", shown])

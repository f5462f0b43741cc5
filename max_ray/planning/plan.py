"""PipelinePlan: everything decided before a weight is read. Made once, frozen, shipped to every worker.

The flow: settings -> config.json -> the architecture's record -> checks -> encoding, lengths, cache size. Each value
remembers where it came from, for `--print-config` and for the table that a refused start shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from max_ray.config import PipelineConfig
from max_ray.custom_code import PackedCode, pack_architectures
from max_ray.errors import ConfigError, ParallelismError
from max_ray.huggingface import (
    HuggingFaceConfig,
    load_generation_config,
    resolve_model_path,
)
from max_ray.interfaces import KVCacheParams, PipelineTask, SupportedEncoding, WeightsFormat
from max_ray.interfaces.request import unsupported_generation_options
from max_ray.log import get_logger
from max_ray.planning.encoding import choose_encoding
from max_ray.planning.fit import ModelFacts, fit_memory
from max_ray.planning.hardware import Hardware
from max_ray.planning.memory_plan import MemoryPlan
from max_ray.planning.served_config import served_config
from max_ray.planning.tasks import choose_task, sentence_files
from max_ray.registry import PIPELINE_REGISTRY, SupportedArchitecture
from max_ray.sentence_files import SentenceFiles
from max_ray.tokenization.tokenizer import TextTokenizer

_LOG = get_logger(__name__)

SMALL_MODEL_BYTES = 64 * 1024**2
"""Below this a second thread saves little, and takes the core that the HTTP side needs at every step: measured."""


@dataclass(frozen=True)
class PipelinePlan:
    """A resolved configuration. Picklable; imports no torch to be unpickled.

    `stock_tokenizer`: the tokenizer's class where it is max_ray's own and serves as it is, so a process that only
    tokenizes need not import the family's code (and torch with it). `num_blocks` is None on GPUs: each worker measures
    what its device has left once the weights are in, and the group takes the smallest. `memory` is the plan that the
    start was checked against. `kv_params` are one rank's. `origins` says where each resolved value came from.
    `sentence`: of the embeddings task, how a text's vector is made.
    """

    config: PipelineConfig
    model_dir: str
    architecture: str
    task: PipelineTask
    huggingface_config: HuggingFaceConfig
    generation_config: Mapping[str, Any]
    encoding: SupportedEncoding
    weights_format: WeightsFormat
    device: str
    tensor_parallel_size: int
    num_threads: int
    max_length: int
    max_batch_size: int
    kv_params: KVCacheParams
    num_blocks: int | None
    memory: MemoryPlan
    stock_tokenizer: type[TextTokenizer] | None = None
    sentence: SentenceFiles | None = None
    custom_code: tuple[PackedCode, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_pooled(self) -> bool:
        """Whether each text takes one step and no cache: of the tasks of embeddings and of scores."""
        return self.task is not PipelineTask.TEXT_GENERATION

    @property
    def embedding_size(self) -> int | None:
        """Length of the vectors of the embeddings task; None for another."""
        hidden_size = self.huggingface_config.get("hidden_size") or 0
        return None if self.sentence is None else self.sentence.embedding_size(hidden_size)

    @property
    def values(self) -> dict[str, Any]:
        """The resolved values by name, as `--print-config` shows them."""
        return {
            "architecture": self.architecture,
            "task": self.task.value,
            "quantization_encoding": self.encoding.value,
            "device": self.device,
            "tensor_parallel_size": self.tensor_parallel_size,
            "num_threads": self.num_threads,
            "max_length": self.max_length,
            "enable_prefix_caching": self.config.enable_prefix_caching,
            "max_batch_size": self.max_batch_size,
            "kv_cache_blocks": "measured after loading" if self.num_blocks is None else self.num_blocks,
            "kv_cache_bytes_per_token": self.kv_params.bytes_per_token * self.tensor_parallel_size,
        }


def resolve_plan(
    config: PipelineConfig,
    *,
    task: PipelineTask | None = None,
    override_architecture: str | None = None,
    hardware: Hardware | None = None,
) -> PipelinePlan:
    """Decides everything, or raises a ConfigError that says what to change. Reads config.json and the headers of the
    weights. task: by default the configuration's, else what the model is made for."""
    hardware = hardware or Hardware.local()
    model_dir = resolve_model_path(config.model_path, config.revision)
    hf_config = served_config(config, model_dir, override_architecture)
    origins: dict[str, str] = {"architecture": "model: config.json"}
    task = choose_task(config, task, override_architecture or hf_config, model_dir, origins)
    architecture = PIPELINE_REGISTRY.retrieve_architecture(
        override_architecture or hf_config, task=task, custom_architectures=config.custom_architectures
    )
    config = _with_required_arguments(config, architecture)
    sentence = sentence_files(architecture, model_dir)
    device = _device(config, hardware, origins)
    encoding = choose_encoding(config, architecture, hf_config, origins)
    _check_parallelism(config, architecture, hf_config, device, hardware)
    architecture.pipeline_model.check_settings(config, hf_config)
    config = _with_exact_prefixes(config, architecture, hf_config, origins)
    weights_format = weights_format_of(model_dir, architecture)
    is_length_given = config.max_length is not None
    config = _with_sentence_length(config, architecture, hf_config, sentence)
    facts = ModelFacts(model_dir, weights_format, architecture, hf_config, device, hardware)
    memory = fit_memory(config, facts, encoding, origins)
    if config.max_length is not None and not is_length_given:
        origins["max_length"] = "model: sentence_bert_config.json"
    kv_params = facts.kv_params(config, encoding)
    # the workers measure after loading
    measured = device == "cuda" and config.kv_cache_memory is None and kv_params.has_cache
    origins["tensor_parallel_size"] = "given" if config.tensor_parallel_size != 1 else "default"
    generation_config = load_generation_config(model_dir)
    if ignored := unsupported_generation_options(generation_config):
        _LOG.warning("generation_config.json asks for what is not done here: %s.", ", ".join(ignored))
    return PipelinePlan(
        config=config,
        model_dir=str(model_dir),
        architecture=architecture.name,
        task=task,
        huggingface_config=hf_config,
        generation_config=generation_config,
        encoding=encoding,
        weights_format=weights_format,
        device=device,
        tensor_parallel_size=config.tensor_parallel_size,
        num_threads=_num_threads(config, hardware, memory, origins),
        max_length=memory.max_length,
        max_batch_size=memory.max_batch_size,
        kv_params=kv_params,
        num_blocks=None if measured else memory.num_blocks,
        memory=memory,
        stock_tokenizer=_stock_tokenizer(architecture),
        sentence=sentence,
        custom_code=pack_architectures(config.custom_architectures),
        origins=origins,
    )


def _stock_tokenizer(architecture: SupportedArchitecture) -> type[TextTokenizer] | None:
    kind = architecture.tokenizer
    is_own = issubclass(kind, TextTokenizer) and kind.__module__.startswith("max_ray.")
    return kind if is_own and not architecture.context_validators else None


def _device(config: PipelineConfig, hardware: Hardware, origins: dict[str, str]) -> str:
    if config.devices == "auto":
        origins["device"] = f"hardware: {hardware.num_gpus} GPUs"
        return "cuda" if hardware.num_gpus else "cpu"
    origins["device"] = "given"
    if config.devices == "cpu":
        return "cpu"
    if not hardware.num_gpus:
        raise ConfigError(f"devices={config.devices!r} asks for GPUs and there are none here. Use --devices cpu.")
    return "cuda"


def _check_parallelism(
    config: PipelineConfig,
    architecture: SupportedArchitecture,
    hf_config: HuggingFaceConfig,
    device: str,
    hardware: Hardware,
) -> None:
    size = config.tensor_parallel_size
    if size == 1:
        return
    if not architecture.multi_gpu_supported:
        raise ParallelismError(f"{architecture.name} runs on one device only: set tensor_parallel_size=1.")
    architecture.pipeline_model.check_tensor_parallel(hf_config, size)
    if device == "cuda" and hardware.num_gpus < size:
        raise ParallelismError(
            f"tensor_parallel_size={size} needs {size} GPUs and there are {hardware.num_gpus}. "
            f"Set tensor_parallel_size={hardware.num_gpus} or less, or add GPUs."
        )


def _with_required_arguments(config: PipelineConfig, architecture: SupportedArchitecture) -> PipelineConfig:
    """The family's required settings, put in where the user set nothing. Raises ConfigError where they disagree."""
    for name, value in architecture.required_arguments.items():
        if name in config.model_fields_set and getattr(config, name) != value:
            raise ConfigError(f"{architecture.name} needs {name}={value!r}, not {getattr(config, name)!r}.")
    return config.replace(**architecture.required_arguments) if architecture.required_arguments else config


def _with_exact_prefixes(
    config: PipelineConfig, architecture: SupportedArchitecture, hf_config: HuggingFaceConfig, origins: dict[str, str]
) -> PipelineConfig:
    """Switches the prefix cache off for a model whose keys depend on more than the tokens before them."""
    if not config.enable_prefix_caching or architecture.pipeline_model.prefix_is_reusable(config, hf_config):
        return config
    if "enable_prefix_caching" in config.model_fields_set:
        raise ConfigError(
            "This model's keys depend on the length of the whole prompt (rope type 'dynamic' or 'longrope' beyond "
            "the length of its pre-training), so no prefix can be reused: set enable_prefix_caching=False, or a "
            "smaller max_length."
        )
    origins["enable_prefix_caching"] = "model: its keys depend on the length of the whole prompt"
    return config.replace(enable_prefix_caching=False)


def _with_sentence_length(
    config: PipelineConfig,
    architecture: SupportedArchitecture,
    hf_config: HuggingFaceConfig,
    sentence: SentenceFiles | None,
) -> PipelineConfig:
    """The length that sentence_bert_config.json says, where the user says none."""
    if sentence is None or sentence.max_seq_length is None or config.max_length is not None:
        return config
    supported = architecture.pipeline_model.calculate_max_seq_len(config, hf_config)
    return config.replace(max_length=min(supported, sentence.max_seq_length))


def _num_threads(config: PipelineConfig, hardware: Hardware, memory: MemoryPlan, origins: dict[str, str]) -> int:
    if config.num_threads is not None:
        origins["num_threads"] = "given"
        return config.num_threads
    if memory.weights * memory.num_ranks < SMALL_MODEL_BYTES:
        origins["num_threads"] = f"model: less than {SMALL_MODEL_BYTES // 1024**2} MiB of weights"
        return 1
    origins["num_threads"] = f"hardware: {hardware.num_cpus} cores over {config.tensor_parallel_size} workers"
    return max(1, hardware.num_cpus // config.tensor_parallel_size)


def weights_format_of(model_dir: Path, architecture: SupportedArchitecture) -> WeightsFormat:
    """Raises ConfigError for a GGUF file of a family that has no table of names for it."""
    if model_dir.suffix != ".gguf":
        return architecture.default_weights_format
    if WeightsFormat.gguf not in architecture.weight_adapters:
        raise ConfigError(
            f"{architecture.name} cannot be loaded from a GGUF file yet: give its safetensors checkpoint."
        )
    return WeightsFormat.gguf

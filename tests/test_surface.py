"""The public surface, frozen: settings, flags, names to import, entry points. Who changes it changes this file."""

from __future__ import annotations

import dataclasses
import importlib
import tomllib
from typing import Any

import pytest

from max_ray import settings
from max_ray.cli import main as cli
from max_ray.config import PipelineConfig, ServeConfig
from max_ray.registry import SupportedArchitecture
from tests.source_tree import ROOT

REQUIRED, DERIVED = "required", "derived"

PIPELINE_SETTINGS = {
    "model_path": REQUIRED,
    "revision": None,
    "served_model_name": DERIVED,
    "served_model_aliases": DERIVED,
    "task": None,
    "quantization_encoding": None,
    "max_length": None,
    "max_batch_size": None,
    "max_batch_input_tokens": 2048,
    "enable_chunked_prefill": True,
    "max_num_steps": 32,
    "kv_cache_page_size": 16,
    "kv_cache_memory": None,
    "device_memory_utilization": 0.95,
    "enable_prefix_caching": True,
    "tensor_parallel_size": 1,
    "expert_parallel": False,
    "devices": "auto",
    "custom_architectures": (),
    "cuda_graphs": "start",
    "allowed_image_root": None,
    "max_images": 16,
    "max_image_bytes": 16 * 2**20,
    "max_image_pixels": 2**26,
    "allow_special_tokens_in_messages": False,
    "tool_call_parser": "auto",
    "reasoning_parser": "auto",
    "num_threads": None,
}
SERVE_SETTINGS = PIPELINE_SETTINGS | {
    "model_path": "",
    "host": "127.0.0.1",
    "port": 8000,
    "app_name": "max_ray",
    "models": (),
    "front_replicas": 1,
    "min_replicas": 1,
    "scale_to_zero_after_s": 300.0,
    "max_replicas": 1,
    "target_ongoing_requests": 16.0,
    "max_queued_requests": 512,
    "max_queued_tokens": None,
    "lease_grace_s": 60.0,
    "worker_start_timeout_s": 600.0,
    "worker_port_range": None,
    "collective_timeout_s": 60.0,
    "files_dir": None,
    "files_max_bytes": 4 * 2**30,
    "batch_concurrency": 8,
    "allowed_hosts": (),
    "allowed_origins": (),
    "api_keys": DERIVED,
    "api_keys_file": None,
    "ssl_certfile": None,
    "ssl_keyfile": None,
    "otlp_traces_endpoint": None,
    "max_surge_percent": 0,
    "max_stream_s": 3600,
    "drain_timeout_s": 60.0,
    "resume_grace_s": 15.0,
}
GENERATE_FLAGS = {
    *("--prompt", "--chat", "--raw", "--system", "--max-new-tokens", "--max-tokens", "--temperature", "--top-k"),
    *("--top-p", "--min-p", "--seed", "--stop", "--frequency-penalty", "--presence-penalty", "--repetition-penalty"),
}
CHAT_FLAGS = {"--help", "-h", "--url", "--api-key", "--model", "--system"}
CHAOS_FLAGS = {
    *("--help", "-h", "--base-url", "--api-key-env", "--duration", "--seed", "--streams", "--max-tokens", "--kinds"),
    *("--rounds", "--resume"),
}
STATUS_FLAGS = {"--help", "-h", "--url", "--api-key", "--once", "--json", "--interval"}
POOLED_SETTINGS = {
    *("model_path", "revision", "served_model_name", "task", "quantization_encoding", "max_length"),
    *("custom_architectures", "max_batch_size", "max_batch_input_tokens", "devices", "tensor_parallel_size"),
    *("device_memory_utilization", "num_threads"),
}
ENCODE_FLAGS = {"--json", "--dimensions", "--truncate"}
SERVING_BENCHMARK_FLAGS = {
    *("--base-url", "--model", "--api-key-env", "--endpoint", "--timeout"),
    *("--request-rate", "--max-concurrency", "--num-prompts", "--num-warmups", "--temperature", "--ignore-eos"),
    *("--seed", "--dataset", "--input-len", "--output-len", "--prefix-len", "--turns", "--dataset-path"),
    *("--max-total-len", "--tokenizer", "--goodput", "--label", "--json", "--plot"),
}
DEVICE_BENCHMARK_FLAGS = {"--shape", "--device", "--dtype", "--json", "--context"}
NAMES = {
    "max_ray.pipelines": [
        *("PIPELINE_REGISTRY", "PipelineConfig", "PipelinePlan", "PipelineRegistry", "SupportedArchitecture"),
        *("TextGenerationPipeline", "TextTokenizer", "resolve_plan", "EmbeddingsPipeline", "EmbeddingsTokenizer"),
    ],
    "max_ray.pipelines.core": ["GenerationStatus", "TextContext", "TokenBuffer"],
    "max_ray.pipelines.lib": [
        *("PIPELINE_REGISTRY", "HuggingFaceConfig", "KVCacheInputs", "KVCacheParams", "ModelInputs", "ModelOutputs"),
        *("PipelineConfig", "PipelineModel", "PipelineRegistry", "RopeType", "SupportedArchitecture"),
        *(
            "EmbeddingsTokenizer",
            "JudgeTokenizer",
            "PairTokenizer",
            "SupportedEncoding",
            "TextPipelineModel",
            "TextTokenizer",
            "WeightsFormat",
        ),
    ],
    "max_ray.graph.weights": ["WeightsFormat"],
    "max_ray.nn.legacy.kv_cache": ["KVCacheParams", "KVCacheStrategy"],
}
PAGE_NAMES = [
    "max_ray.driver.Accelerator",
    "max_ray.driver.CPU",
    "max_ray.nn.Module",
    "max_ray.nn.Linear",
    "max_ray.kv_cache.PagedKVCacheManager",
    "max_ray.interfaces.Pipeline",
    "max_ray.interfaces.PipelineInputs",
    "max_ray.interfaces.PipelineOutput",
    "max_ray.interfaces.PipelineTokenizer",
    "max_ray.interfaces.PipelineModel",
    "max_ray.interfaces.PipelineTask",
    "max_ray.interfaces.RequestID",
    "max_ray.interfaces.TextGenerationInputs",
    "max_ray.interfaces.TextGenerationOutput",
    "max_ray.interfaces.TextGenerationRequest",
    "max_ray.pipelines.PIPELINE_REGISTRY.retrieve",
    "max_ray.pipelines.PIPELINE_REGISTRY.retrieve_factory",
]
RECORD_FIELDS = [
    *("name", "task", "default_encoding", "supported_encodings", "pipeline_model", "tokenizer"),
    *("default_weights_format", "example_repo_ids", "context_type", "config", "rope_type", "weight_adapters"),
    *("multi_gpu_supported", "required_arguments", "context_validators", "supports_empty_batches"),
    "requires_max_batch_context_length",
]


def defaults(cls: type[PipelineConfig]) -> dict[str, Any]:
    def default(field: Any) -> Any:
        if field.is_required():
            return REQUIRED
        return DERIVED if field.default_factory is not None else field.default

    return {name: default(field) for name, field in cls.model_fields.items()}


def test_settings_and_their_defaults() -> None:
    assert defaults(PipelineConfig) == PIPELINE_SETTINGS
    assert defaults(ServeConfig) == SERVE_SETTINGS
    assert all(field.description for field in ServeConfig.model_fields.values())


def test_flags() -> None:
    _, commands = cli.build_parser()
    common = {"--help", "-h", "--config", "--print-config", "--model"}
    switches = {"--no-enable-chunked-prefill", "--no-enable-prefix-caching", "--no-expert-parallel"}
    switches |= {"--no-allow-special-tokens-in-messages"}

    def flags(command: str) -> set[str]:
        return {flag for action in commands[command]._actions for flag in action.option_strings}

    def of(names: set[str]) -> set[str]:
        return {"--" + name.replace("_", "-") for name in names}

    benchmarks = {"benchmark", *(f"benchmark {kind}" for kind in ("serving", "kernels", "offline", "plot"))}
    commands_of_keys = {"keys", "keys new"}
    others = {"serve", "generate", "batch", "encode", "plan", "warm-cache", "list", "check", "version"}
    assert set(commands) == others | {"run", "chat", "status", "pull", "chaos"} | benchmarks | commands_of_keys
    assert flags("serve") == of(set(SERVE_SETTINGS) - {"api_keys", "models"}) | common | switches
    assert flags("generate") == of(set(PIPELINE_SETTINGS)) | common | switches | GENERATE_FLAGS
    assert flags("encode") == (of(POOLED_SETTINGS) | common | ENCODE_FLAGS) - {"--print-config"}
    hidden = {"api_keys", "models", "model_path"}
    served = of(set(SERVE_SETTINGS) - hidden) | common | switches | {"--system", "--api-key"}
    assert flags("run") == served - {"--print-config", "--model"}
    assert flags("chat") == CHAT_FLAGS
    assert flags("status") == STATUS_FLAGS
    assert flags("chaos") == CHAOS_FLAGS
    assert flags("pull") == {"--help", "-h", "--revision"}
    assert flags("batch") == (of(set(PIPELINE_SETTINGS)) | common | switches) - {"--print-config"}
    assert flags("plan") == (of(set(PIPELINE_SETTINGS)) | common | switches | {"--json"}) - {"--print-config"}
    assert flags("warm-cache") == of({"model_path", "model", "revision", "custom_architectures"}) | {"--help", "-h"}
    assert flags("list") == {"--help", "-h", "--json", "--custom-architectures"}
    assert flags("check") == {"--help", "-h", "--model-path"}
    limits = {"--max-concurrent-requests", "--requests-per-minute", "--tokens-per-minute"}
    assert flags("keys new") == {"--help", "-h", "--models", "--weight", "--admin"} | limits
    assert flags("keys") == {"--help", "-h"}
    assert flags("version") == flags("benchmark") == {"--help", "-h"}
    assert flags("benchmark plot") == {"--help", "-h", "--output"}
    assert flags("benchmark kernels") == {"--help", "-h", "--tokens", "--rows"} | DEVICE_BENCHMARK_FLAGS
    offline = {"--family", "--batches", "--steps", "--prompt", "--peer", "--peer-budget"}
    assert flags("benchmark offline") == {"--help", "-h"} | offline | DEVICE_BENCHMARK_FLAGS
    assert flags("benchmark serving") == {"--help", "-h"} | SERVING_BENCHMARK_FLAGS


def test_environment_variables_beside_the_settings() -> None:
    assert {f"MAX_RAY_{n}" for n in ("CONFIG", "CACHE_DIR", "LOG_LEVEL", "NATIVE", "INT8")} == settings.OTHER_VARIABLES


@pytest.mark.parametrize("module", sorted(NAMES))
def test_names(module: str) -> None:
    loaded = importlib.import_module(module)
    assert sorted(loaded.__all__) == sorted(NAMES[module])
    for name in NAMES[module]:
        assert getattr(loaded, name) is not None
    with pytest.raises(AttributeError):
        _ = loaded.no_such_name


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_names_of_the_page(name: str) -> None:
    module, _, rest = name.partition(".PIPELINE_REGISTRY")
    path, _, attribute = (module if not rest else f"{module}.PIPELINE_REGISTRY").rpartition(".")
    found = getattr(importlib.import_module(path), attribute)
    assert callable(getattr(found, rest[1:]) if rest else found)


def test_one_object_under_all_its_names() -> None:
    from max_ray import interfaces
    from max_ray.pipelines import core, lib

    assert core.TextContext is interfaces.TextContext
    assert lib.PipelineModel is interfaces.PipelineModel
    assert lib.PIPELINE_REGISTRY is importlib.import_module("max_ray.registry").PIPELINE_REGISTRY
    assert lib.TextTokenizer is importlib.import_module("max_ray.tokenization.tokenizer").TextTokenizer


def test_fields_of_the_record() -> None:
    assert [field.name for field in dataclasses.fields(SupportedArchitecture)] == RECORD_FIELDS


def test_entry_points() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"max-ray": "max_ray.cli.main:main"}
    families = project["entry-points"]["max_ray.architectures"]
    for name, module in families.items():
        assert name in {record.name for record in importlib.import_module(module).ARCHITECTURES}

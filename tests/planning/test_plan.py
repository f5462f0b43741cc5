"""The plan: what is decided, and refused, before a weight is read."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from max_ray.errors import ConfigError, EncodingNotSupportedError, ParallelismError, WeightsError
from max_ray.interfaces import SupportedEncoding
from max_ray.pipelines import PIPELINE_REGISTRY, PipelineConfig, resolve_plan
from max_ray.planning.hardware import GIB, Hardware
from tests.checkpoints import make_llama

CPU_MACHINE = Hardware(num_cpus=8, memory_bytes=16 * GIB, num_gpus=0)
GPU_MACHINE = Hardware(num_cpus=32, memory_bytes=256 * GIB, num_gpus=2)
BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4  # keys and values, layers, KV heads, head_dim, float32: make_llama's defaults


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("plan") / "tiny")


def plan(path: Path, hardware: Hardware = CPU_MACHINE, **settings: Any) -> Any:
    return resolve_plan(PipelineConfig(model_path=str(path), **settings), hardware=hardware)


def test_defaults_follow_from_model_and_hardware(model_path: Path) -> None:
    made = plan(model_path)
    assert (made.device, made.encoding, made.max_length) == ("cpu", SupportedEncoding.float32, 256)
    assert made.kv_params.bytes_per_token == BYTES_PER_TOKEN
    assert made.num_blocks == made.max_batch_size * 256 // 16
    assert made.origins["max_length"] == "model: config.json"
    assert "hardware" in made.origins["device"]
    assert pickle.loads(pickle.dumps(made)) == made


def test_gpus_are_used_where_there_are_any_and_measured_by_the_workers(model_path: Path) -> None:
    made = plan(model_path, GPU_MACHINE)
    assert (made.device, made.num_blocks) == ("cuda", None)
    assert plan(model_path, GPU_MACHINE, devices="cpu").device == "cpu"
    with pytest.raises(ConfigError, match="there are none here"):
        plan(model_path, devices="gpu")


def test_encoding_is_checked_before_loading(model_path: Path) -> None:
    assert plan(model_path, quantization_encoding="bfloat16").kv_params.dtype == "bfloat16"
    with pytest.raises(
        EncodingNotSupportedError, match=r"gptq needs a checkpoint in that.*: bfloat16, float16, float32, q4_0"
    ):
        plan(model_path, quantization_encoding="gptq")


def test_tensor_parallel_size_is_checked_before_loading(model_path: Path) -> None:
    made = plan(model_path, tensor_parallel_size=4)
    assert made.kv_params.num_kv_heads == 1
    with pytest.raises(ParallelismError, match="num_attention_heads=4"):
        plan(model_path, tensor_parallel_size=3)
    with pytest.raises(ParallelismError, match="needs 4 GPUs and there are 2"):
        plan(model_path, GPU_MACHINE, tensor_parallel_size=4)


def test_cache_budget_bounds_the_blocks_and_the_length(model_path: Path) -> None:
    budget_gib = 100 * 16 * BYTES_PER_TOKEN / GIB
    assert plan(model_path, kv_cache_memory=budget_gib * 1.001).num_blocks == 100
    short = plan(model_path, kv_cache_memory=budget_gib / 10 * 1.01)
    assert (short.num_blocks, short.max_length) == (10, 160)
    assert "KV cache holds 160" in short.origins["max_length"]


def test_a_length_that_was_asked_for_is_refused_with_settings_that_work(model_path: Path) -> None:
    little = 10 * 16 * BYTES_PER_TOKEN * 1.01 / GIB
    with pytest.raises(ConfigError, match=r"holds 160 tokens.*--max-length 160 or --kv-cache-memory") as refused:
        plan(model_path, max_length=256, kv_cache_memory=little)
    offered = float(str(refused.value).rsplit("--kv-cache-memory ", 1)[1].rstrip("."))
    assert plan(model_path, max_length=256, kv_cache_memory=offered).max_length == 256
    assert plan(model_path, max_length=160, kv_cache_memory=little).max_length == 160


def test_prefixes_are_not_reused_where_keys_depend_on_the_prompt_length(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    path = make_llama(tmp_path / "dynamic", rope_parameters=rope)
    assert plan(path).config.enable_prefix_caching is False
    assert plan(path, max_length=256).config.enable_prefix_caching is True
    with pytest.raises(ConfigError, match="set enable_prefix_caching=False"):
        plan(path, enable_prefix_caching=True)


def test_required_arguments_of_a_family_are_put_in(model_path: Path) -> None:
    record = PIPELINE_REGISTRY.retrieve_architecture("LlamaForCausalLM")
    needy = replace(record, name="NeedyForCausalLM", required_arguments={"enable_chunked_prefill": False})
    PIPELINE_REGISTRY.register(needy)
    try:
        config = PipelineConfig(model_path=str(model_path))
        made = resolve_plan(config, override_architecture="NeedyForCausalLM", hardware=CPU_MACHINE)
        assert made.config.enable_chunked_prefill is False
        with pytest.raises(ConfigError, match="needs enable_chunked_prefill=False"):
            resolve_plan(
                config.replace(enable_chunked_prefill=True),
                override_architecture="NeedyForCausalLM",
                hardware=CPU_MACHINE,
            )
    finally:
        PIPELINE_REGISTRY.reset()


def test_threads_are_shared_out_unless_the_model_is_too_small(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan(model_path).num_threads == 1
    monkeypatch.setattr("max_ray.planning.plan.SMALL_MODEL_BYTES", 0)
    assert plan(model_path).num_threads == 8
    assert plan(model_path, tensor_parallel_size=2).num_threads == 4
    assert plan(model_path, num_threads=3).num_threads == 3


@pytest.mark.parametrize(
    ("change", "drop", "message"),
    [
        ({"num_hidden_layers": 3}, (), "num_hidden_layers is 3, the checkpoint has layers 0 to 1"),
        ({"num_hidden_layers": 1}, (), "num_hidden_layers is 1, the checkpoint has layers 0 to 1"),
        ({}, ("model.layers.0.",), "num_hidden_layers is 2, the checkpoint has layers 1"),
        ({"vocab_size": 300}, (), "vocab_size is 300, model.embed_tokens.weight has 272 rows"),
        ({}, ("lm_head.weight",), r"lacks 1 tensor \(lm_head.weight\)"),
        (
            {"tie_word_embeddings": True},
            ("model.embed_tokens.weight",),
            r"lacks 1 tensor \(model.embed_tokens.weight\)",
        ),
    ],
)
def test_a_config_of_another_checkpoint(
    model_path: Path, tmp_path: Path, change: dict[str, Any], drop: tuple[str, ...], message: str
) -> None:
    config = json.loads((model_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    kept = {n: t for n, t in load_file(model_path / "model.safetensors").items() if not n.startswith(drop or ("-",))}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        plan(tmp_path)


def test_what_generation_config_asks_for_in_vain_is_said(
    model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copytree(model_path, tmp_path / "model")
    made = {"no_repeat_ngram_size": 3, "num_beams": 1, "suppress_tokens": [], "top_p": 0.9, "forced_eos_token_id": 2}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(made))
    plan(tmp_path / "model")
    assert "what is not done here: no_repeat_ngram_size=3, forced_eos_token_id=2." in caplog.text
    caplog.clear()
    plan(model_path)
    assert not caplog.records

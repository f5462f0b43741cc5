"""The memory plan: its numbers against loaded models, what is refused, and that what it offers then fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from max_ray.cli import main as cli
from max_ray.config import PipelineConfig
from max_ray.distributed import TPGroup
from max_ray.errors import DoesNotFitError
from max_ray.pipelines import PIPELINE_REGISTRY, PipelinePlan, resolve_plan
from max_ray.planning.hardware import GIB, GpuMemory, Hardware
from max_ray.planning.memory_plan import RUNTIME_BYTES
from max_ray.weights import open_weights
from tests.checkpoints import make_llama
from tests.gguf_files import K_SIZES, make_gguf
from tests.held_weights import held_weights
from tests.nn.ranks import cut

SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True, "vocab_size": 1000},
    {"num_key_value_heads": 1, "attention_bias": True},
    {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3},
]


def machine(gib: float, **more: Any) -> Hardware:
    return Hardware(num_cpus=4, memory_bytes=int(gib * GIB), num_gpus=0, **more)


def held(plan: PipelinePlan, tp: TPGroup) -> int:
    """Bytes of the weights of one rank's loaded network."""
    record = PIPELINE_REGISTRY.retrieve_architecture(plan.architecture)
    source = open_weights(plan.model_dir, plan.weights_format, keep_quantized=plan.encoding.is_quantized)
    adapter = record.weight_adapters[plan.weights_format]
    model: Any = record.pipeline_model(
        plan.config, plan.huggingface_config, plan.encoding, tp.device, tp, source, adapter
    )
    return sum(weight.nbytes for weight in held_weights(model.network))


@pytest.mark.parametrize("encoding", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_planned_weights_are_what_ranks_hold(tmp_path: Path, shape: dict[str, Any], encoding: str) -> None:
    path = make_llama(tmp_path, **shape)
    for size in (1, 2):
        config = PipelineConfig(model_path=str(path), tensor_parallel_size=size, quantization_encoding=encoding)
        plan = resolve_plan(config, hardware=machine(8))
        assert plan.memory.weights == pytest.approx(held(plan, cut(size)[-1]), rel=0.02)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1"])
def test_planned_weights_of_quantized_files(tmp_path: Path, kind: str) -> None:
    path = make_gguf(tmp_path / "m.gguf", {"token_embd": "Q6_K"}, default=kind, **K_SIZES)
    plan = resolve_plan(PipelineConfig(model_path=str(path)), hardware=machine(8))
    actual = held(plan, TPGroup.single())
    assert plan.memory.weights == pytest.approx(actual, rel=0.02)
    growth = {"Q5_0": 34 / 22, "Q5_1": 34 / 24}.get(kind, 1.0)  # kept as q8_0
    assert actual <= 1.15 * growth * open_weights(path).nbytes()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 MiB of float32 weights; 4 KiB of keys and values a token."""
    return make_llama(
        tmp_path_factory.mktemp("plan") / "m",
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=2048,
        max_position_embeddings=65536,
    )


def fixed(memory: Any) -> float:
    return float(memory.weights + memory.activations + memory.runtime) / GIB


def test_a_start_that_cannot_fit_is_refused_with_settings_that_then_start(model_path: Path) -> None:
    config = PipelineConfig(model_path=str(model_path), max_length=60000, max_batch_size=8)
    roomy = resolve_plan(config, hardware=machine(8)).memory
    tight = machine((fixed(roomy) + 0.3 * 60000 * roomy.kv_bytes_per_token / GIB) / 0.9)
    with pytest.raises(DoesNotFitError, match=r"GiB a rank are missing(.|\n)*weights(.|\n)*capacity") as refused:
        resolve_plan(config, hardware=tight)
    offered = str(refused.value).split("Settings that fit:\n")[1].splitlines()
    assert any("--max-length" in line for line in offered)
    assert any("--quantization-encoding bfloat16" in line for line in offered)
    for line in offered:
        words = line.split()
        changes = {flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
        assert resolve_plan(config.replace(**changes), hardware=tight).memory.shortage == 0


def test_a_smaller_encoding_with_a_shorter_length_is_offered(model_path: Path) -> None:
    """Where the weights alone are too large, and the nearest encoding leaves too little for the whole length."""
    config = PipelineConfig(model_path=str(model_path), quantization_encoding="float32")
    roomy = resolve_plan(config, hardware=machine(8)).memory
    tight = machine((fixed(roomy) - 0.1 * roomy.weights / GIB) / 0.9)
    with pytest.raises(DoesNotFitError, match="--quantization-encoding bfloat16 --max-length") as refused:
        resolve_plan(config, hardware=tight)
    (line,) = [line for line in str(refused.value).splitlines() if "bfloat16 --max-length" in line]
    changed = config.replace(quantization_encoding="bfloat16", max_length=int(line.split()[-1]))
    assert resolve_plan(changed, hardware=tight).memory.shortage == 0


def test_a_length_that_nobody_asked_for_shrinks(model_path: Path) -> None:
    config = PipelineConfig(model_path=str(model_path))
    roomy = resolve_plan(config, hardware=machine(8)).memory
    plan = resolve_plan(config, hardware=machine((fixed(roomy) + 20000 * roomy.kv_bytes_per_token / GIB) / 0.9))
    assert 19000 < plan.max_length < 20100
    assert "hardware" in plan.origins["max_length"]
    with pytest.raises(DoesNotFitError, match="none: this machine is too small"):
        resolve_plan(config, hardware=machine(RUNTIME_BYTES["cpu"] / GIB))


@pytest.mark.parametrize(
    ("tokens", "length", "batch"), [(4096, 2048, 8), (4112, 2048, 9), (512, 512, 1), (320, 32, 10)]
)
def test_the_default_batch_is_what_the_cache_holds(model_path: Path, tokens: int, length: int, batch: int) -> None:
    cache = (tokens + 0.5) * 4096 / GIB
    config = PipelineConfig(model_path=str(model_path), max_length=length, kv_cache_memory=cache)
    plan = resolve_plan(config, hardware=machine(8))
    assert (plan.max_batch_size, plan.num_blocks) == (batch, tokens // 16)
    assert "KV cache holds" in plan.origins["max_batch_size"]
    given = resolve_plan(config.replace(max_batch_size=3), hardware=machine(8))
    assert (given.max_batch_size, given.origins["max_batch_size"]) == (3, "given")
    roomy = resolve_plan(PipelineConfig(model_path=str(model_path)), hardware=machine(8))
    assert (roomy.max_batch_size, roomy.origins["max_batch_size"]) == (64, "default for cpu")


def test_a_cpu_keeps_room_for_usual_requests_by_default(model_path: Path) -> None:
    """The bound that counts is the one that the plan names."""

    def tokens(gib: float = 64, **settings: Any) -> tuple[int, str]:
        plan = resolve_plan(PipelineConfig(model_path=str(model_path), **settings), hardware=machine(gib))
        assert plan.origins["kv_cache_blocks"] == plan.memory.cache_origin
        assert plan.memory.cache_origin in plan.memory.text()
        return plan.memory.num_blocks * 16, plan.memory.cache_origin

    flag = "(--kv-cache-memory changes it)"
    whole = resolve_plan(PipelineConfig(model_path=str(model_path)), hardware=machine(64)).max_length
    assert tokens() == (64 * 1024, f"default: 64 requests of 1024 tokens {flag}")
    assert tokens(max_batch_size=2) == (whole, f"default: 1 request of {whole} tokens {flag}")
    assert tokens(max_length=512) == (64 * 512, "all that a batch can use: 64 requests of 512 tokens")
    assert tokens(max_batch_size=4, max_length=8192) == (
        4 * 8192,
        "all that a batch can use: 4 requests of 8192 tokens",
    )
    held, origin = tokens(0.75)
    assert (held, origin) == (int(0.25 * 0.75 * GIB) // 4096 // 16 * 16, "hardware: 25% of 0.8 GiB at most")
    held, origin = tokens(kv_cache_memory=0.5)
    assert (held, origin) == (GIB // 2 // 4096, "kv_cache_memory=0.5 GiB a rank")


def test_memory_that_others_hold_on_a_gpu_counts_as_taken(model_path: Path) -> None:
    config = PipelineConfig(model_path=str(model_path), max_length=2048, max_batch_input_tokens=64, max_batch_size=4)
    free = Hardware(4, 8 * GIB, 2, (GpuMemory(8 * GIB, 8 * GIB), GpuMemory(8 * GIB, 8 * GIB)))
    busy = Hardware(4, 8 * GIB, 2, (GpuMemory(8 * GIB, int(0.9 * GIB)), GpuMemory(8 * GIB, GIB)))
    plan = resolve_plan(config, hardware=free)
    assert (plan.device, plan.num_blocks, plan.memory.num_blocks) == ("cuda", None, 4 * 128)
    with pytest.raises(DoesNotFitError, match=r"others hold up to 7.*GiB of a GPU"):
        resolve_plan(config, hardware=busy)
    unseen = resolve_plan(config, hardware=Hardware(4, 8 * GIB, 2)).memory
    assert (unseen.capacity, unseen.shortage) == (None, 0)


def test_the_command_prints_the_plan(
    model_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hardware, "local", lambda: machine(8))
    arguments = ["plan", "--model-path", str(model_path), "--max-length", "4096", "--max-batch-size", "2"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "capacity" in printed
    assert "requests at once: 2 of 4096 tokens, 2 of 2048 tokens" in printed
    assert cli.main([*arguments, "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["num_blocks"] == 2 * 4096 // 16
    assert memory["requests_at_once"] == {"4096": 2, "2048": 2}
    assert memory["weights"] == sum(memory["weight_groups"].values())


def test_warm_cache_checks_a_model(model_path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["warm-cache", "--model-path", str(model_path)]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    (tmp_path / "config.json").write_text((model_path / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert cli.main(["warm-cache", "--model-path", str(tmp_path)]) == 2
    assert "save_pretrained" in capsys.readouterr().err
    values = json.loads((model_path / "config.json").read_text()) | {"hidden_act": "relu6"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert cli.main(["warm-cache", "--model-path", str(tmp_path)]) == 2
    assert "hidden_act='relu6'" in capsys.readouterr().err


def test_warm_cache_refuses_what_a_start_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 3, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["warm-cache", "--model-path", str(tmp_path)]) == 2
    assert "has bits 3; what can be read: 4 and 8 bits" in capsys.readouterr().err

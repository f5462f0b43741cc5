"""Multimodal repositories whose text network alone is served: against the whole network of `transformers`, by the way
of a start (registry, plan, checkpoint)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from max_ray.cli import main as cli
from max_ray.config import PipelineConfig
from max_ray.conformance.reference import huggingface_reference
from max_ray.errors import ConfigError, InputError, WeightsError
from max_ray.huggingface import load_huggingface_config
from max_ray.interfaces import PipelineTask
from max_ray.pipelines import PIPELINE_REGISTRY, resolve_plan
from max_ray.planning.tasks import task_of
from tests.architectures.adapter_models import make_adapter_checkpoint
from tests.architectures.greedy import PROMPT, reference_tokens, served_logits, served_tokens
from tests.architectures.multimodal import (
    MULTIMODAL,
    SERVED,
    Multimodal,
    change_config,
    find_multimodal,
    in_the_old_layout,
    make_multimodal,
    multimodal_config,
)
from tests.checkpoints import make_tokenizer

FAST = ("gemma3", "mistral3", "qwen2_5_vl", "gemma4")
BY_KIND = [pytest.param(m, marks=() if m.model_type in FAST else pytest.mark.slow, id=m.model_type) for m in SERVED]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def settings(folder: Path, **given: Any) -> PipelineConfig:
    values = {"quantization_encoding": "float32", **given}
    return PipelineConfig(model_path=str(folder), devices="cpu", num_threads=1, **values)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def config_only(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("model", BY_KIND)
def test_the_text_network_computes_what_the_whole_does(model: Multimodal, tmp_path: Path) -> None:
    folder = make_multimodal(model, tmp_path)
    (expected,) = huggingface_reference(folder)([PROMPT])
    torch.testing.assert_close(served_logits(folder), expected, atol=1e-4, rtol=0)
    in_the_old_layout(folder, model)
    torch.testing.assert_close(served_logits(folder), expected, atol=1e-4, rtol=0)


def test_a_tower_whose_code_is_not_installed(tmp_path: Path) -> None:
    """Gemma 3n: its tower is timm's."""
    folder = make_multimodal(find_multimodal("gemma3n"), tmp_path / "whole")
    alone = make_adapter_checkpoint("Gemma3nForCausalLM", tmp_path / "text")
    assert served_tokens(folder) == reference_tokens(alone)


@pytest.mark.parametrize("kind", ["kimi_k2", "deepseek_v3"])
def test_kimi_k25_as_published(kind: str, tmp_path: Path) -> None:
    """Its text network, whose model_type is one of the checkpoint's own code, is a DeepSeek V3."""
    model = find_multimodal("kimi_k25")
    folder = in_the_old_layout(make_multimodal(model, tmp_path / "whole"), model)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    own = {"model_type": kind, "architectures": ["DeepseekV3ForCausalLM"], "auto_map": {"AutoConfig": "m.Config"}}
    change_config(folder, text_config={**text, **own}, auto_map={"AutoModel": "m.KimiK25ForConditionalGeneration"})
    assert "language_model.model.layers.0.input_layernorm.weight" in load_file(folder / "model.safetensors")
    alone = make_adapter_checkpoint("DeepseekV3ForCausalLM", tmp_path / "text")
    assert resolve_plan(settings(folder)).architecture == "DeepseekV3ForCausalLM"
    assert served_tokens(folder) == reference_tokens(alone)


def test_a_config_that_is_flat(tmp_path: Path) -> None:
    """Qwen2-VL and Qwen2.5-VL as they were published: the values of the text network among those of the whole, its
    tensors without a prefix."""
    folder = make_multimodal(find_multimodal("qwen2_5_vl"), tmp_path)
    (expected,) = huggingface_reference(folder)([PROMPT])
    values = json.loads((folder / "config.json").read_text())
    text = {n: v for n, v in values.pop("text_config").items() if n not in ("model_type", "rope_parameters")}
    rope = {"rope_theta": 10_000.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    (folder / "config.json").write_text(json.dumps({**text, **values, **rope}))
    edit(folder, lambda w: {n.replace("model.language_model", "model").replace("model.visual", "visual"): t
                            for n, t in w.items()})  # fmt: skip
    torch.testing.assert_close(served_logits(folder), expected, atol=1e-4, rtol=0)


def test_a_config_that_says_little(tmp_path: Path) -> None:
    """gemma-3-4b: what is not in `text_config` is as transformers has it by default."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    folder = config_only(
        tmp_path, architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3", text_config=text,
        vision_config={"hidden_size": 1152}, eos_token_id=[1, 106],
    )  # fmt: skip

    served = PIPELINE_REGISTRY.served_config(load_huggingface_config(folder))
    record = PIPELINE_REGISTRY.retrieve_architecture(served)
    assert record.name == "Gemma3ForCausalLM"
    numbers = record.pipeline_model.config_of(served)  # type: ignore[attr-defined]
    assert (numbers.num_heads, numbers.num_kv_heads, numbers.head_dim) == (8, 4, 256)
    assert (numbers.vocab_size, numbers.global_rope.scaling["factor"]) == (262208, 8.0)
    assert record.pipeline_model.calculate_max_seq_len(settings(folder), served) == 131072
    assert task_of(settings(folder)) is PipelineTask.TEXT_GENERATION


def test_the_log_says_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_multimodal(find_multimodal("gemma3"), tmp_path)
    with caplog.at_level(logging.INFO):
        resolve_plan(settings(folder))
    (said,) = [r.getMessage() for r in caplog.records if "its text network alone" in r.getMessage()]
    assert said.startswith("Gemma3ForConditionalGeneration")


def test_only_what_is_loaded_counts_as_memory(tmp_path: Path) -> None:
    model = find_multimodal("mistral3")
    folder = make_multimodal(model, tmp_path)
    before = resolve_plan(settings(folder)).memory.weights
    edit(folder, lambda w: {**w, "model.vision_tower.more.weight": torch.zeros(1000, 1000)})
    plan = resolve_plan(settings(folder))
    assert plan.memory.weights == before
    assert plan.architecture == "MistralForCausalLM"


@pytest.mark.parametrize("said", [{"tie_word_embeddings": False}, {"tie_word_embeddings": True}])
def test_the_checkpoint_says_whether_the_head_is_tied(tmp_path: Path, said: dict[str, bool]) -> None:
    """The two parts of config.json may differ."""
    folder = make_multimodal(find_multimodal("mistral3"), tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    expected = reference_tokens(folder)
    values = json.loads((folder / "config.json").read_text())
    change_config(folder, text_config={**values["text_config"], **said}, tie_word_embeddings=False)
    assert served_tokens(folder) == expected


def scaled(weights: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """A matrix in float8 with a scale for the whole of it, as `compressed-tensors` stores it."""
    scale = weights[name].abs().max() / 448
    codes = (weights[name] / scale).to(torch.float8_e4m3fn)
    return {**weights, name: codes, f"{name}_scale": scale.reshape(1)}


@pytest.mark.parametrize("part", ["whole", "text"])
def test_a_quantized_text_network(tmp_path: Path, part: str) -> None:
    folder = in_the_old_layout(make_multimodal(find_multimodal("mistral3"), tmp_path))
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    exact = load_file(folder / "model.safetensors")
    quantized = scaled(exact, name)
    values = json.loads((folder / "config.json").read_text())
    edit(folder, lambda w: {**w, name: quantized[name].float() * quantized[f"{name}_scale"]})
    expected = served_logits(folder)
    edit(folder, lambda _: quantized)
    scheme = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    text = values["text_config"] | ({"quantization_config": scheme} if part == "text" else {})
    change_config(folder, text_config=text, quantization_config=scheme if part == "whole" else None)
    edit(folder, lambda w: {n.replace("weight_scale", "weight_scale_inv"): t for n, t in w.items()})
    torch.testing.assert_close(served_logits(folder), expected, atol=1e-5, rtol=0)


def test_a_tensor_of_no_known_part(tmp_path: Path) -> None:
    folder = make_multimodal(find_multimodal("gemma3"), tmp_path)
    edit(folder, lambda w: {**w, "model.something_else.weight": torch.zeros(3)})
    with pytest.raises(WeightsError, match=r"no place for 1 tensor \(model.something_else.weight"):
        served_tokens(folder)


def test_a_text_network_that_is_not_whole(tmp_path: Path) -> None:
    folder = make_multimodal(find_multimodal("gemma3"), tmp_path)
    edit(folder, lambda w: {n: t for n, t in w.items() if not n.endswith("layers.1.mlp.up_proj.weight")})
    with pytest.raises(WeightsError, match=r"lacks 1 tensor \(model.layers.1.mlp.up_proj.weight"):
        served_tokens(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("lfm2_vl", "it has layers of conv"), ("qwen3_5", "it has layers of linear_attention")],
)
def test_a_text_network_that_cannot_run_here(tmp_path: Path, kind: str, message: str) -> None:
    model = next(m for m in MULTIMODAL if m.model_type == kind)
    values = multimodal_config(model).to_dict() | {"architectures": [model.class_name], "dtype": None}
    folder = config_only(tmp_path, **{n: v for n, v in values.items() if v is not None})
    save_file({"lm_head.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        resolve_plan(settings(folder))


def test_images_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_multimodal(find_multimodal("gemma3"), tmp_path)
    make_tokenizer().save_pretrained(folder)
    change_config(folder, eos_token_id=[2, 7])
    tokenizer, _ = PIPELINE_REGISTRY.retrieve_factory(settings(folder))
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(InputError, match="takes text only and cannot see images"):
        tokenizer.render_chat([{"role": "user", "content": [image]}])
    assert {2, 7} <= tokenizer.eos_token_ids


def test_warm_cache_checks_what_is_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_multimodal(find_multimodal("gemma3"), tmp_path)
    make_tokenizer().save_pretrained(folder)
    assert cli.main(["warm-cache", "--model-path", str(folder)]) == 0
    num_text = sum("language_model" in name or "lm_head" in name for name in load_file(folder / "model.safetensors"))
    assert f"Gemma3ForCausalLM, {num_text} tensors" in capsys.readouterr().out


def test_a_family_of_the_whole_goes_first(tmp_path: Path) -> None:
    folder = make_multimodal(find_multimodal("gemma3"), tmp_path / "model")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text(
        "from dataclasses import replace\n"
        "from architectures.qwen3_vl import qwen3_vl_arch\n"
        "ARCHITECTURES = [replace(qwen3_vl_arch, name='Gemma3ForConditionalGeneration')]\n"
    )
    config = load_huggingface_config(folder)
    custom = [str(tmp_path / "own")]
    try:
        assert PIPELINE_REGISTRY.served_config(config, custom) is config
    finally:
        PIPELINE_REGISTRY.reset()
    assert PIPELINE_REGISTRY.served_config(config) is not config

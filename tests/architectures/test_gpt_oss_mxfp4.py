"""gpt-oss as it is published, experts in MXFP4, against the bfloat16 checkpoint of the same numbers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from max_ray.config import PipelineConfig
from max_ray.errors import WeightsError
from max_ray.huggingface import load_huggingface_config
from max_ray.interfaces import SupportedEncoding, WeightsFormat
from max_ray.pipelines import resolve_plan
from max_ray.pipelines.factory import build_local_runners
from max_ray.planning.checkpoint import open_checkpoint
from max_ray.weights import DictWeightSource, WeightSource
from max_ray.weights.mxfp4_checkpoint import Mxfp4Checkpoint
from tests.architectures.families import find_tiny, make_tiny

EXPERTS = ("gate_up_proj", "down_proj")


def make_mxfp4(folder: Path) -> Path:
    """The tiny gpt-oss, its experts replaced by random blocks."""
    model = find_tiny("gpt-oss")
    plain = make_tiny(replace(model, overrides={**model.overrides, "intermediate_size": 64}), folder / "plain")
    path, tensors = folder / "mxfp4", load_file(plain / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(EXPERTS)]:
        num_experts, inputs, outputs = tensors.pop(name).shape
        shape = (num_experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(120, 128, shape, dtype=torch.uint8, generator=generator)
    path.mkdir()
    config = json.loads((plain / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(plain)
    return path


def opened(path: Path) -> WeightSource:
    config = load_huggingface_config(path)
    return open_checkpoint(path, WeightsFormat.safetensors, config, SupportedEncoding.bfloat16)


def test_experts_are_those_of_transformers(tmp_path: Path) -> None:
    path = make_mxfp4(tmp_path)
    source, stored = opened(path), load_file(path / "model.safetensors")
    names = [name for name in source.names() if name.endswith(EXPERTS)]
    assert len(names) == 8
    assert not any(name.endswith(("_blocks", "_scales")) for name in source.names())
    for name in names:
        theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=torch.bfloat16)
        assert source.shape(name) == tuple(theirs.shape)
        assert torch.equal(source.get(name), theirs)
        for axis in range(3):
            assert torch.equal(source.get_slice(name, axis, 1, 5), theirs.narrow(axis, 1, 5 - 1))


def test_a_model_is_loaded_and_planned_in_bfloat16(tmp_path: Path) -> None:
    plan = resolve_plan(PipelineConfig(model_path=str(make_mxfp4(tmp_path)), devices="cpu", num_threads=1))
    assert plan.encoding is SupportedEncoding.bfloat16
    (runner,) = build_local_runners(plan)
    assert runner.num_blocks == plan.num_blocks


def test_blocks_without_their_scales() -> None:
    tensors = {"a_blocks": torch.zeros(1, 2, 3, 16, dtype=torch.uint8), "a_scales": torch.zeros(1, 2, 2)}
    with pytest.raises(WeightsError, match=r"a has blocks of \[1, 2, 3, 16\] and scales of \[1, 2, 2\]"):
        Mxfp4Checkpoint(DictWeightSource(tensors))

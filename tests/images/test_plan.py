"""What the plan of a model that sees images knows: numbers nested in config.json, the tower's bytes, the tokenizer."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures.qwen3_vl import qwen3_vl_arch
from architectures.qwen3_vl_moe import qwen3_vl_moe_arch
from max_ray.distributed import TPGroup
from max_ray.errors import ConfigError
from max_ray.images.tokenizer import ImageTextTokenizer
from max_ray.interfaces import SupportedEncoding
from max_ray.pipelines import PIPELINE_REGISTRY, PipelineConfig, resolve_plan
from tests.architectures.vision import DENSE, SPARSE, VisionFamily, VisionLab, make_served_vision
from tests.held_weights import held_weights

FAMILIES = {"dense": DENSE, "experts": SPARSE}


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def family(request: pytest.FixtureRequest) -> VisionFamily:
    for record in (qwen3_vl_arch, qwen3_vl_moe_arch):
        PIPELINE_REGISTRY.register(record)
    found: VisionFamily = request.param
    return found


def plan_of(path: Path, **settings: Any) -> Any:
    return resolve_plan(PipelineConfig(model_path=str(path), devices="cpu", **settings))


def test_the_planned_weights_are_those_that_are_loaded(family: VisionFamily, tmp_path: Path) -> None:
    lab = VisionLab(family, tmp_path)
    plan = plan_of(tmp_path)
    assert (plan.encoding, plan.max_length) == (SupportedEncoding.float32, 256)
    model: Any = lab.suite.architecture.pipeline_model(
        plan.config,
        plan.huggingface_config,
        plan.encoding,
        torch.device("cpu"),
        TPGroup.single(torch.device("cpu")),
        lab.weights(),
    )
    groups = {"visual": 0, "other": 0}
    for weight in held_weights(model.network):
        groups["visual" if weight.name.startswith("visual.") else "other"] += weight.nbytes
    assert plan.memory.weight_groups["vision tower"] == groups["visual"]
    assert plan.memory.weights == sum(groups.values())
    cut = plan_of(tmp_path, tensor_parallel_size=2).memory
    assert cut.weight_groups["vision tower"] == groups["visual"], "every rank holds the tower whole"
    assert cut.weights < plan.memory.weights


def test_the_dtype_may_stand_with_the_text_model_only(tmp_path: Path) -> None:
    path = VisionLab(DENSE, tmp_path).path
    config = path / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"', 1))
    assert plan_of(path).encoding is SupportedEncoding.bfloat16
    config.write_text(config.read_text().replace('  "dtype": "bfloat16",\n', "", 1))
    text = config.read_text().replace('"text_config": {', '"text_config": {"dtype": "float16",', 1)
    config.write_text(text)
    assert plan_of(path).encoding is SupportedEncoding.float16


def test_a_process_that_only_tokenizes_loads_no_torch(tmp_path: Path) -> None:
    plan = plan_of(make_served_vision(DENSE, tmp_path / "model"), max_images=3)
    assert plan.stock_tokenizer is ImageTextTokenizer
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    code = (
        "import pickle, sys\n"
        "from max_ray.pipelines.factory import build_tokenizer\n"
        f"tokenizer = build_tokenizer(pickle.load(open({str(tmp_path / 'plan')!r}, 'rb')))\n"
        "loaded = sorted({'torch', 'ray'} & set(sys.modules))\n"
        "print(type(tokenizer).__name__, tokenizer.image_limits.max_images, loaded)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.split("\n")[-2] == "ImageTextTokenizer 3 []"


def test_a_folder_that_does_not_say_how_to_resize(tmp_path: Path) -> None:
    path = make_served_vision(DENSE, tmp_path)
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="preprocessor_config"):
        ImageTextTokenizer(path, max_length=100)
    config = path / "config.json"
    config.write_text(config.read_text().replace('"image_token_id"', '"other_token_id"'))
    with pytest.raises(ConfigError, match="image_token_id"):
        ImageTextTokenizer(path, max_length=100)

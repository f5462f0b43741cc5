"""Layouts of published checkpoints: shards in folders of their own, and layers that predict further tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from max_ray.config import PipelineConfig
from max_ray.errors import WeightsError
from max_ray.pipelines import resolve_plan
from max_ray.weights import open_weights
from tests.architectures.families import find_tiny, make_tiny
from tests.architectures.test_refusals import load


def sharded(folder: Path, places: dict[str, str]) -> Path:
    """A folder with an index that places each tensor, of one number, in a file."""
    for name, file in places.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: torch.ones(1)}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def test_shards_in_folders(tmp_path: Path) -> None:
    source = open_weights(sharded(tmp_path, {"a": "shards/one.safetensors", "b": "two.safetensors", "c": "x/y/z.st"}))
    assert sorted(source.names()) == ["a", "b", "c"]
    assert [source.get(name).item() for name in "abc"] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("file", ["../out.safetensors", "a/../../out.safetensors", "a\\out.safetensors", "", "."])
def test_shards_outside_of_the_folder_are_refused(file: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "out.safetensors")
    inner = tmp_path / "inner"
    (inner / "a").mkdir(parents=True)
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(WeightsError, match="which is no file of its folder"):
        open_weights(inner)
    absolute = json.dumps({"weight_map": {"a": str(tmp_path / "out.safetensors")}})
    (inner / "model.safetensors.index.json").write_text(absolute)
    with pytest.raises(WeightsError, match="which is no file of its folder"):
        open_weights(inner)


def with_predictor(folder: Path, names: dict[str, str], **config: Any) -> Path:
    """A DeepSeek V3 with tensors of its last layer again under other names. names: part of a name -> what takes its
    place."""
    make_tiny(find_tiny("DeepSeek V3"), folder)
    weights = load_file(folder / "model.safetensors")
    for part, other in names.items():
        weights |= {name.replace(part, other): w + 0 for name, w in list(weights.items()) if part in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values.pop("num_nextn_predict_layers", None)
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


@pytest.mark.parametrize("names", [
    {"layers.2.": "layers.3.", "layers.2.input_layernorm": "layers.3.eh_proj"},
    {"model.layers.2.input_layernorm": "model.mtp.layers.0.norm"},
    {"model.layers.2.input_layernorm": "mtp.fc"},
])  # fmt: skip
def test_layers_that_predict_further_tokens_need_no_count(names: dict[str, str], tmp_path: Path) -> None:
    folder = with_predictor(tmp_path / "with", names)
    plain = make_tiny(find_tiny("DeepSeek V3"), tmp_path / "plain")
    plans = [resolve_plan(PipelineConfig(model_path=str(place), devices="cpu")) for place in (folder, plain)]
    assert plans[0].memory == plans[1].memory
    assert load(folder).network is not None


def test_a_layer_too_many_is_still_refused(tmp_path: Path) -> None:
    folder = with_predictor(tmp_path, {"layers.2.": "layers.3."})
    with pytest.raises(WeightsError, match="num_hidden_layers is 3, the checkpoint has layers 0 to 3"):
        resolve_plan(PipelineConfig(model_path=str(folder), devices="cpu"))

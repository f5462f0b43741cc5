"""`models:` in a YAML file, and `--model-path` given several times."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from max_ray.cli import main as cli
from max_ray.config import PipelineConfig, ServeConfig, SettingsError, load_config
from max_ray.serve.serve_config import load_serve_config
from tests.source_tree import ROOT

YAML = """
port: 9000
max_length: 512
models:
  - model_path: one/model
    name: one
    aliases: [uno, eins]
    max_length: 256
  - model: other/model
    min_replicas: 0
    max_replicas: 2
    scale_to_zero_after_s: 60
"""


def test_a_file_with_blocks(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(YAML)
    config, origins = load_serve_config({"max_num_steps": 7}, config_file=file, environ={})
    assert config.has_front
    assert origins["models"] == f"file {file}"
    one, other = config.model_configs
    assert (one.served_model_name, one.served_model_aliases, one.max_length) == ("one", ("uno", "eins"), 256)
    assert (other.served_model_name, other.max_length) == ("other/model", 512)
    assert (other.min_replicas, other.max_replicas, other.scale_to_zero_after_s) == (0, 2, 60)
    assert (one.min_replicas, one.max_replicas) == (1, 1)
    assert {(model.port, model.max_num_steps) for model in (one, other)} == {(9000, 7)}
    assert pickle.loads(pickle.dumps(config)) == config
    plain, _ = load_config(PipelineConfig, {"model_path": "m"}, config_file=file, environ={})
    assert plain.max_length == 512


def test_one_model_has_no_front_unless_it_may_sleep() -> None:
    config = ServeConfig(model_path="m")
    assert config.model_configs == (config,)
    assert not config.has_front
    assert ServeConfig(model_path="m", min_replicas=0).has_front


ONE: dict[str, Any] = {"model_path": "a/b"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"models": [ONE, ONE]}, "Two models have the name 'a/b'"),
        ({"models": [ONE, {"model_path": "c", "aliases": ["a/b"]}]}, "Two models have the name 'a/b'"),
        ({"models": [{"name": "x"}]}, "Block 1 of models: model_path is missing."),
        ({"models": [ONE, {**ONE, "name": "x", "port": 1}]}, "Block 2 of models: port is for all models"),
        ({"models": [{**ONE, "api_keys": "k"}]}, "Block 1 of models: api_keys is for all models"),
        ({"models": [{**ONE, "models": []}]}, "Block 1 of models: models is for all models"),
        ({"models": [{**ONE, "max_lenght": 5}]}, "There is no setting 'max_lenght'. Did you mean 'max_length'?"),
        ({"models": [{**ONE, "max_length": 0}]}, "Block 1 of models: max_length should be"),
        ({"models": [{**ONE, "min_replicas": 2}]}, "max_replicas=1 is less than min_replicas=2"),
        ({"models": [ONE], "model_path": "c"}, "models has a block for each model"),
        ({"models": [ONE], "served_model_name": "c"}, "models has a block for each model"),
        ({"models": "a,b"}, "models should be"),
        ({"model_path": "m", "min_replicas": -1}, "min_replicas should be greater than or equal to 0"),
    ],
)
def test_mistakes(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        ServeConfig(**settings)
    assert sentence in str(caught.value)


def test_print_config_shows_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    file = ROOT / "deployments" / "configs" / "several_models.yaml"
    assert cli.main(["serve", "--config", str(file), "--print-config"]) == 0
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    found = {
        name: [row[1:] for row in rows if row[0] == name] for name in ("served_model_name", "min_replicas", "port")
    }
    assert found["served_model_name"] == [["shakespeare", "block 1 of models"], ["sleeper", "block 2 of models"]]
    assert found["min_replicas"] == [["1", "default"], ["0", "block 2 of models"]]
    assert found["port"] == [["8000", f"file {file}"]] * 2


def test_the_flag_given_several_times(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    served: list[ServeConfig] = []
    monkeypatch.setattr("deployments.builder.serve_main", served.append)
    assert cli.main(["serve", "--model-path", "a/one", "--model", "b/two", "--max-length", "64"]) == 0
    assert cli.main(["serve", "--model-path", "a/one"]) == 0
    several, single = served
    assert [(one.model_path, one.max_length) for one in several.model_configs] == [("a/one", 64), ("b/two", 64)]
    assert (single.model_path, single.models) == ("a/one", ())
    assert cli.main(["serve", "--model-path", "a/one", "--model-path", "a/one"]) == 2
    assert "Two models have the name 'a/one'" in capsys.readouterr().err

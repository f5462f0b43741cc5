"""The sample of several models, as a server would read it."""

from __future__ import annotations

from max_ray.serve.serve_config import load_serve_config
from tests.source_tree import ROOT


def test_the_sample_of_several_models() -> None:
    file = ROOT / "deployments" / "configs" / "several_models.yaml"
    config, _ = load_serve_config({}, config_file=file, environ={})
    assert [(one.served_model_name, one.min_replicas) for one in config.model_configs] == [
        ("shakespeare", 1),
        ("sleeper", 0),
    ]
    assert [one.served_model_aliases for one in config.model_configs] == [("bard",), ()]

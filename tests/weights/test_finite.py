"""Numbers that are not finite: found in every dtype, and refused while a checkpoint is read, by the tensor's name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from max_ray.config import PipelineConfig
from max_ray.errors import WeightsError
from max_ray.pipelines import PIPELINE_REGISTRY
from max_ray.weights.finite import is_finite
from tests.checkpoints import make_llama

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_number_among_many(dtype: torch.dtype, value: float) -> None:
    x = torch.cat(
        [
            torch.randn(1000).to(dtype),
            torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0, -0.0], dtype=dtype),
        ]
    )
    assert is_finite(x)
    assert is_finite(x.view(4, 251)[:, 3:100])
    x[517] = value
    assert not is_finite(x)
    assert not is_finite(x.view(4, 251)[:, 3:100])
    assert is_finite(x[:517])


def test_others_are_finite() -> None:
    assert all(is_finite(torch.full((3,), -1, dtype=dtype)) for dtype in (torch.int16, torch.int64, torch.uint8))
    assert is_finite(torch.empty(0))


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "q8_0"])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "lm_head.weight",
    ],
)
def test_a_checkpoint_with_one_is_refused(name: str, encoding: str, tmp_path: Path) -> None:
    folder = make_llama(tmp_path, dtype=torch.bfloat16)
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[-3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = PipelineConfig(model_path=str(folder), devices="cpu", quantization_encoding=encoding)
    with pytest.raises(WeightsError, match="finite"):
        PIPELINE_REGISTRY.retrieve(config)


def test_the_tensor_is_named_and_the_dtype(tmp_path: Path) -> None:
    folder = make_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = PipelineConfig(model_path=str(folder), devices="cpu")
    PIPELINE_REGISTRY.retrieve(config.replace(quantization_encoding="bfloat16"))
    with pytest.raises(WeightsError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' .*not finite as float16"):
        PIPELINE_REGISTRY.retrieve(config.replace(quantization_encoding="float16"))

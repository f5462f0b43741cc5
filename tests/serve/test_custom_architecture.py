"""A model family of the user's own, in a folder that the workers never see: its code travels with the order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

from max_ray.config import ServeConfig
from max_ray.pipelines import PIPELINE_REGISTRY
from max_ray.serve.application import build_application
from tests.checkpoints import BOS_ID, load_reference, make_llama, make_tokenizer
from tests.serve.applications import running, text_of, worker_pids
from tests.serve.conftest import settings_for

pytestmark = [pytest.mark.ray]

INIT = "from .arch import contrary_arch\n\nARCHITECTURES = [contrary_arch]\n"
ARCH = """
from dataclasses import replace

from architectures.llama3 import llama_arch

from .network.model import ContraryModel

contrary_arch = replace(llama_arch, name="ContraryForCausalLM", pipeline_model=ContraryModel)
"""
MODEL = """
from dataclasses import replace

from architectures.llama3.model import Llama3Model

from ..scale import SCALE


class ContraryModel(Llama3Model):
    def execute(self, model_inputs):
        outputs = super().execute(model_inputs)
        return replace(outputs, logits=outputs.logits * SCALE)
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A Llama that prefers what a Llama likes least. Each folder is new, so that no cache of another run knows it."""
    folder = tmp_path / "contrary"
    (folder / "network").mkdir(parents=True)
    (folder / "__init__.py").write_text(INIT)
    (folder / "arch.py").write_text(ARCH)
    (folder / "scale.py").write_text(f"SCALE = -1.0  # {uuid4()}\n")
    (folder / "network" / "__init__.py").write_text("")
    (folder / "network" / "model.py").write_text(MODEL)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = make_llama(tmp_path / "model", seed=3)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["ContraryForCausalLM"]}))
    return path


def least_liked(model: Path, prompt: str, num_tokens: int) -> str:
    """Hugging Face's Llama, choosing the smallest logit each time."""
    network, tokenizer = load_reference(model), make_tokenizer()
    ids = tokenizer(prompt)["input_ids"]
    assert ids[0] == BOS_ID
    prompt_length = len(ids)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmin()))
    text: str = tokenizer.decode(ids[prompt_length:], skip_special_tokens=True)
    return text


async def test_the_code_travels_to_the_workers(ray_cluster: Any, model: Path, code: Path, serve_port: int) -> None:
    settings = settings_for(
        model, serve_port, "custom", custom_architectures=(str(code),), tensor_parallel_size=2, max_num_steps=4
    )
    try:
        built = build_application(ServeConfig(**settings))
        code.rename(code.with_name("gone"))
        async with running(built, serve_port, "custom") as served:
            assert len(set(worker_pids("custom"))) == 2
            for prompt in ("Hello", "another prompt"):
                expected = least_liked(model, prompt, 16)
                assert "\ufffd" not in expected or len(expected) > 4
                assert await text_of(served, prompt, 16) == expected
    finally:
        PIPELINE_REGISTRY.reset()

"""Registers the encoder families, whether or not the installed metadata knows them, and a way to embed in process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from max_ray.config import PipelineConfig
from max_ray.interfaces import EmbeddingsGenerationInputs, EmbeddingsGenerationRequest, RequestID
from max_ray.pipelines import PIPELINE_REGISTRY
from tests.embeddings.checkpoints import Vectors, make_encoder

PACKAGES = ("bert", "mpnet", "modern_bert", "qwen", "xlm_roberta")
Embed = Callable[..., Vectors]


@pytest.fixture(autouse=True)
def families() -> Iterator[None]:
    for package in PACKAGES:
        for record in import_module(f"architectures.{package}").ARCHITECTURES:
            PIPELINE_REGISTRY.register(record, allow_override=True)
    yield
    PIPELINE_REGISTRY.reset()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("embeddings") / "tiny-bert", "bert")


def embed_in_process(folder: Path, inputs: Sequence[str | list[int]], **settings: Any) -> Vectors:
    """[len(inputs), D], through tokenizer and pipeline of this process."""
    settings = {"quantization_encoding": "float32", "num_threads": 1, **settings}
    tokenizer, pipeline = PIPELINE_REGISTRY.retrieve(PipelineConfig(model_path=str(folder), **settings))
    requests = [EmbeddingsGenerationRequest(RequestID(), input=text) for text in inputs]
    contexts = [asyncio.run(tokenizer.new_context(request)) for request in requests]
    outputs = pipeline.execute(EmbeddingsGenerationInputs([{c.request_id: c for c in contexts}]))
    assert all(output.is_done for output in outputs.values())
    return np.stack([outputs[c.request_id].embeddings for c in contexts])

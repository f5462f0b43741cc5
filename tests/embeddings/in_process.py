"""Embeds texts in this process, with the encoder families registered whether or not installed metadata knows them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from max_ray.config import PipelineConfig
from max_ray.interfaces import EmbeddingsGenerationInputs, EmbeddingsGenerationRequest, RequestID
from max_ray.pipelines import PIPELINE_REGISTRY
from tests.embeddings.checkpoints import Vectors

PACKAGES = (
    *("bert", "distilbert", "gemma3", "gte", "mistral", "modern_bert", "mpnet", "nomic_bert", "qwen", "xlm_roberta"),
)


def register_families() -> None:
    for package in PACKAGES:
        for record in import_module(f"architectures.{package}").ARCHITECTURES:
            PIPELINE_REGISTRY.register(record, allow_override=True)


def embed_in_process(folder: Path, inputs: Sequence[str | list[int]], **settings: Any) -> Vectors:
    """[len(inputs), D], through tokenizer and pipeline of this process."""
    settings = {"quantization_encoding": "float32", "num_threads": 1, **settings}
    tokenizer, pipeline = PIPELINE_REGISTRY.retrieve(PipelineConfig(model_path=str(folder), **settings))
    requests = [EmbeddingsGenerationRequest(RequestID(), input=text) for text in inputs]
    contexts = [asyncio.run(tokenizer.new_context(request)) for request in requests]
    outputs = pipeline.execute(EmbeddingsGenerationInputs([{c.request_id: c for c in contexts}]))
    assert all(output.is_done for output in outputs.values())
    return np.stack([outputs[c.request_id].embeddings for c in contexts])

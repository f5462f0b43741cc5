"""The engine of the conformance suite, with a Llama in it. Imports no transformers, so that a spawned rank starts
quickly."""

from __future__ import annotations

from pathlib import Path

from architectures.llama3.model import Llama3Model
from max_ray.config import PipelineConfig
from max_ray.conformance.engine import Engine, random_tokens
from max_ray.distributed import TPGroup
from max_ray.huggingface import load_huggingface_config
from max_ray.interfaces import SupportedEncoding
from max_ray.weights import open_weights

__all__ = ["Engine", "load_model", "random_tokens"]


def load_model(
    path: Path, tp: TPGroup | None = None, encoding: str = "float32", page_size: int = 16, max_length: int | None = None
) -> Llama3Model:
    tp = tp or TPGroup.single()
    config = PipelineConfig(model_path=str(path), kv_cache_page_size=page_size, max_length=max_length)
    huggingface_config = load_huggingface_config(path)
    return Llama3Model(config, huggingface_config, SupportedEncoding(encoding), tp.device, tp, open_weights(path))

"""Greedy tokens of a folder: as the library serves it, and as `transformers` picks them, each token alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from max_ray.config import PipelineConfig
from max_ray.conformance.engine import Engine, random_tokens
from max_ray.conformance.reference import huggingface_reference
from max_ray.distributed import TPGroup
from max_ray.nn import Module, pack_weights
from max_ray.pipelines import resolve_plan
from max_ray.planning.checkpoint import open_checkpoint
from max_ray.registry import PIPELINE_REGISTRY

PROMPT = random_tokens([21], 130)[0]
NUM_GREEDY = 12


def load_as_served(folder: Path, **settings: Any) -> Any:
    """One rank of the model in float32, by the way of a start: the plan, the checkpoint, the family's model."""
    given = {"quantization_encoding": "float32", "kv_cache_page_size": 8, **settings}
    config = PipelineConfig(model_path=str(folder), devices="cpu", num_threads=1, **given)
    plan = resolve_plan(config)
    record = PIPELINE_REGISTRY.retrieve_architecture(plan.architecture, plan.task)
    source = open_checkpoint(Path(plan.model_dir), plan.weights_format, plan.huggingface_config, plan.encoding)
    adapter = record.weight_adapters.get(plan.weights_format)
    tp = TPGroup.single()
    model = record.pipeline_model(plan.config, plan.huggingface_config, plan.encoding, tp.device, tp, source, adapter)
    for network in vars(model).values():
        if isinstance(network, Module):
            pack_weights(network)
    return model


def served_tokens(folder: Path, **settings: Any) -> list[int]:
    """What the library picks after PROMPT."""
    return Engine(load_as_served(folder, **settings)).greedy(PROMPT, NUM_GREEDY)


def served_logits(folder: Path, **settings: Any) -> torch.Tensor:
    """[len(PROMPT), vocabulary], of the prompt in two pieces."""
    (logits,) = Engine(load_as_served(folder, **settings)).logits_of([PROMPT], [[9, len(PROMPT) - 9]])
    return logits


def reference_tokens(folder: Path) -> list[int]:
    """What `transformers` picks after PROMPT, in float32, without a cache."""
    reference, tokens = huggingface_reference(folder), list(PROMPT)
    with torch.inference_mode():
        for _ in range(NUM_GREEDY):
            tokens.append(int(reference([tokens])[0][-1].argmax()))
    return tokens[len(PROMPT) :]

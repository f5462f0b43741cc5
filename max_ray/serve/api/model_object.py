"""The object of a model in `/v1/models`."""

from __future__ import annotations

from typing import Any

from max_ray.interfaces import PipelineTask
from max_ray.serve.api.engine import ModelView


def model_object(model: ModelView, created: int) -> dict[str, Any]:
    """OpenAI's object, with the length, modalities, template and parsers of the model.

    Args:
        model: What is described.
        created: When its server started, in Unix seconds.
    """
    is_chat = model.task is PipelineTask.TEXT_GENERATION
    return {
        "id": model.model_name,
        "aliases": list(model.model_aliases),
        "object": "model",
        "created": created,
        "owned_by": "max_ray",
        "max_model_len": model.tokenizer.max_length,
        "task": model.task.value,
        "modalities": ["text", "image"] if model.tokenizer.takes_images else ["text"],
        **({"chat_template": model.tokenizer.describe_chat_template(), **model.parsers.public()} if is_chat else {}),
    }

"""The object of a model in `/v1/models`."""

from __future__ import annotations

from max_ray.interfaces import PipelineTask
from max_ray.output_parsers import NONE
from max_ray.serve.api.engine import ModelView
from max_ray.serve.api.objects.openai import ModelObject


def model_object(model: ModelView, created: int) -> ModelObject:
    """OpenAI's object, with the length, modalities, template and parsers of the model.

    Args:
        model: What is described.
        created: When its server started, in Unix seconds.
    """
    is_chat = model.task is PipelineTask.TEXT_GENERATION
    described: ModelObject = {
        "id": model.model_name,
        "aliases": list(model.model_aliases),
        "object": "model",
        "created": created,
        "owned_by": "max_ray",
        "max_model_len": model.tokenizer.max_length,
        "task": model.task.value,
        "modalities": ["text", "image"] if model.tokenizer.takes_images else ["text"],
    }
    if is_chat:
        described["chat_template"] = model.tokenizer.describe_chat_template()
        described["tool_call_parser"] = model.parsers.tools or NONE
        described["reasoning_parser"] = model.parsers.reasoning or NONE
    return described

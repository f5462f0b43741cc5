"""Objects that describe a model in Ollama's API."""

from __future__ import annotations

from max_ray.interfaces import PipelineTask
from max_ray.serve.api.api_context import ModelDetails
from max_ray.serve.api.engine import ModelView
from max_ray.serve.api.objects.ollama import OllamaModelDescription, OllamaModelDetails, OllamaModelEntry


def listed_model(model: ModelView, details: ModelDetails) -> OllamaModelEntry:
    """A model as lists have it. It has no digest: it comes from no registry of Ollama's.

    Args:
        model: What is described.
        details: Of its weights.
    """
    name = model.model_name
    return {
        "name": name,
        "model": name,
        "size": details.size_bytes,
        "digest": "",
        "details": _details(details),
    }


def _details(details: ModelDetails) -> OllamaModelDetails:
    return {
        "parent_model": "",
        "format": details.format,
        "family": details.family,
        "families": [details.family] if details.family else [],
        "parameter_size": "",
        "quantization_level": details.encoding,
    }


def shown_model(model: ModelView, details: ModelDetails) -> OllamaModelDescription:
    """A model as `/api/show` has it.

    Args:
        model: What is described.
        details: Of its weights.
    """
    family = details.family or "unknown"
    model_info: dict[str, str | int] = {
        "general.architecture": family,
        f"{family}.context_length": model.tokenizer.max_length,
    }
    if model.embedding_size is not None:
        model_info[f"{family}.embedding_length"] = model.embedding_size
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _details(details),
        "model_info": model_info,
        "capabilities": _capabilities(model),
    }


def _capabilities(model: ModelView) -> list[str]:
    if model.task is not PipelineTask.TEXT_GENERATION:
        return ["embedding"] if model.task is PipelineTask.EMBEDDINGS_GENERATION else []
    found = {
        "completion": True,
        "vision": model.tokenizer.takes_images,
        "tools": model.parsers.tools is not None,
        "thinking": model.parsers.reasoning is not None,
    }
    return [name for name, is_there in found.items() if is_there]

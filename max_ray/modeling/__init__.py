"""What a model family is built on: PipelineModel and its bases, and the loading of a network's weights.

Importing this package imports no torch; what needs it is imported when first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from max_ray.modeling.pipeline_model import PipelineModel

if TYPE_CHECKING:
    from max_ray.modeling.causal_lm import CausalLMModel
    from max_ray.modeling.packed_loading import load_network
    from max_ray.modeling.text_pipeline_model import TextPipelineModel

__all__ = ["CausalLMModel", "PipelineModel", "TextPipelineModel", "load_network"]

_LATER = {
    "CausalLMModel": "max_ray.modeling.causal_lm",
    "TextPipelineModel": "max_ray.modeling.text_pipeline_model",
    "load_network": "max_ray.modeling.packed_loading",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)

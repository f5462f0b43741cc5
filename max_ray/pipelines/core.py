"""`max_ray.pipelines.core`: the context of a request, under the name the pipeline page uses."""

from max_ray.interfaces import GenerationStatus, TextContext, TokenBuffer

__all__ = ["GenerationStatus", "TextContext", "TokenBuffer"]

"""`max-ray encode`: vectors of texts, computed in this process."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

from max_ray.config import PipelineConfig
from max_ray.errors import InputError
from max_ray.interfaces import (
    EmbeddingsContext,
    EmbeddingsGenerationInputs,
    EmbeddingsGenerationRequest,
    PipelineTask,
    RequestID,
)
from max_ray.serve.api.embeddings import check_dimensions, shortened

FLAGS = ("text", "json", "dimensions", "truncate")
"""What a command line has beside the settings."""


def add_encode_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="*", help="Texts to embed; without any, the lines of the standard input.")
    parser.add_argument("--json", action="store_true", help="machine-readable: one object with everything")
    parser.add_argument("--dimensions", type=int, default=None, metavar="N", help="Keep the first N numbers.")
    parser.add_argument("--truncate", action="store_true", help="Cut off what is too long instead of refusing it.")


def run_encode(config: PipelineConfig, given: dict[str, Any]) -> None:
    """Prints a vector a text, as a JSON array a line; with --json one object. Raises MaxRayError."""
    from max_ray.pipelines import PIPELINE_REGISTRY

    task = PipelineTask.EMBEDDINGS_GENERATION
    tokenizer, factory = PIPELINE_REGISTRY.retrieve_factory(config, task)
    check_dimensions(given["dimensions"], factory.plan.embedding_size)  # type: ignore[attr-defined]
    texts = given["text"] or [line.rstrip("\r\n") for line in sys.stdin]
    contexts = asyncio.run(_contexts(tokenizer, config.served_model_name, texts, given["truncate"]))
    outputs = factory().execute(EmbeddingsGenerationInputs([{c.request_id: c for c in contexts}]))
    vectors = [shortened(outputs[c.request_id].embeddings, given["dimensions"]).tolist() for c in contexts]
    if not given["json"]:
        for vector in vectors:
            print(json.dumps(vector))
        return
    data = [
        {"index": i, "text": text, "num_tokens": len(context.tokens), "embedding": vector}
        for i, (text, context, vector) in enumerate(zip(texts, contexts, vectors, strict=True))
    ]
    print(json.dumps({"model": config.served_model_name, "data": data}))


async def _contexts(tokenizer: Any, model_name: str, texts: list[str], truncate: bool) -> list[EmbeddingsContext]:
    """Raises InputError, which says which of several texts is at fault."""
    contexts: list[EmbeddingsContext] = []
    for number, text in enumerate(texts, start=1):
        try:
            request = EmbeddingsGenerationRequest(RequestID(), model_name, text, truncate)
            contexts.append(await tokenizer.new_context(request))
        except InputError as error:
            raise InputError(f"Text {number}: {error}") from None
    return contexts

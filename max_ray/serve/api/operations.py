"""What each operation of the HTTP API takes and answers, beside the body's model: for `/openapi.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from max_ray.serve.api.objects import anthropic, files, ollama, openai, responses, server
from max_ray.serve.api.objects.page import Page

JSON, SSE, NDJSON, BYTES = "application/json", "text/event-stream", "application/x-ndjson", "application/octet-stream"
_CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Why is the sky blue?"}]


@dataclass(frozen=True)
class Operation:
    """One method of one route.

    Args:
        answer: The type of the JSON answer; None where it is no JSON.
        media_type: Of the answer.
        stream: The media type of the answer in pieces; None where it always comes whole.
        example: A body that works. `model` is added where `needs_model`.
        needs_model: Whether the body has to name the model.
        query: JSON schemas of the parameters of the query, by name.
        others: What else the answer may be: status and meaning.
    """

    answer: Any = None
    media_type: str = JSON
    stream: str | None = None
    example: Mapping[str, Any] | None = None
    needs_model: bool = False
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    others: Mapping[int, str] = field(default_factory=dict)


def _page(most: int, *, ordered: bool) -> dict[str, Mapping[str, Any]]:
    """The parameters of a page."""
    order = {"order": {"type": "string", "enum": ["asc", "desc"]}} if ordered else {}
    return {"after": {"type": "string"}, "limit": {"type": "integer", "minimum": 1, "maximum": most}, **order}


_SCORE = Operation(openai.ScoreList, example={"text_1": "What is Python?", "text_2": ["A language.", "A snake."]})
_RERANK = Operation(
    openai.RerankResult, example={"query": "What is Python?", "documents": ["A language.", "A snake."], "top_n": 1}
)
_UNCHANGED = {304: "The file that the client has."}
OPERATIONS: Mapping[str, Operation] = {
    "GET /v1/models": Operation(openai.ModelList),
    "GET /v1/models/{model:path}": Operation(openai.ModelObject),
    "POST /v1/completions": Operation(
        openai.Completion, stream=SSE, example={"prompt": "The sky is", "max_tokens": 8, "temperature": 0}
    ),
    "POST /v1/chat/completions": Operation(
        openai.ChatCompletion, stream=SSE, example={"messages": _CHAT, "max_tokens": 8, "temperature": 0}
    ),
    "POST /v1/embeddings": Operation(openai.EmbeddingList, example={"input": ["The sky is blue.", "Grass is green."]}),
    "GET /v1/requests/{answer_id}": Operation(server.RequestObject),
    "GET /v1/streams/{stream_id}": Operation(
        media_type=SSE, stream=SSE, query={"from": {"type": "string"}, "model": {"type": "string"}}
    ),
    "DELETE /v1/streams/{stream_id}": Operation(server.EndedStream, query={"model": {"type": "string"}}),
    "POST /v1/score": _SCORE,
    "POST /score": _SCORE,
    "POST /v1/rerank": _RERANK,
    "POST /rerank": _RERANK,
    "POST /v2/rerank": _RERANK,
    "POST /v1/responses": Operation(
        responses.ResponseObject, stream=SSE, example={"input": "Why is the sky blue?", "max_output_tokens": 8}
    ),
    "GET /v1/responses/{response_id}": Operation(
        responses.ResponseObject, query={"stream": {"type": "string", "enum": ["false"]}}
    ),
    "DELETE /v1/responses/{response_id}": Operation(responses.DeletedResponse),
    "POST /v1/responses/{response_id}/cancel": Operation(responses.ResponseObject),
    "GET /v1/responses/{response_id}/input_items": Operation(Page[dict[str, Any]], query=_page(100, ordered=True)),
    "GET /v1/files": Operation(
        Page[files.FileObject], query={**_page(10_000, ordered=True), "purpose": {"type": "string"}}
    ),
    "POST /v1/files": Operation(files.FileObject),
    "GET /v1/files/{file_id}": Operation(files.FileObject),
    "DELETE /v1/files/{file_id}": Operation(files.DeletedFile),
    "GET /v1/files/{file_id}/content": Operation(media_type=BYTES),
    "GET /v1/batches": Operation(Page[files.BatchObject], query=_page(100, ordered=False)),
    "POST /v1/batches": Operation(
        files.BatchObject,
        example={"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
    ),
    "GET /v1/batches/{batch_id}": Operation(files.BatchObject),
    "POST /v1/batches/{batch_id}/cancel": Operation(files.BatchObject),
    "POST /v1/messages": Operation(
        anthropic.MessageObject, stream=SSE, example={"messages": _CHAT, "max_tokens": 8, "temperature": 0}
    ),
    "POST /v1/messages/count_tokens": Operation(anthropic.TokenCount, example={"messages": _CHAT}),
    "POST /api/chat": Operation(
        ollama.OllamaChatAnswer,
        stream=NDJSON,
        example={"messages": _CHAT, "stream": False, "options": {"num_predict": 8}},
        needs_model=True,
    ),
    "POST /api/generate": Operation(
        ollama.OllamaGenerateAnswer,
        stream=NDJSON,
        example={"prompt": "Why is the sky blue?", "stream": False, "options": {"num_predict": 8}},
        needs_model=True,
    ),
    "POST /api/embed": Operation(
        ollama.OllamaEmbeddings, example={"input": ["The sky is blue.", "Grass is green."]}, needs_model=True
    ),
    "GET /api/tags": Operation(ollama.OllamaModelList),
    "POST /api/show": Operation(ollama.OllamaShownModel, example={}, needs_model=True),
    "GET /api/ps": Operation(ollama.OllamaRunningModelList),
    "GET /api/version": Operation(server.Version),
    "POST /tokenize": Operation(openai.TokenizedPrompt, example={"prompt": "The sky is blue."}),
    "POST /detokenize": Operation(openai.DetokenizedPrompt, example={"tokens": [1, 2, 3]}),
    "GET /tokenizer_info": Operation(openai.TokenizerInfo),
    "GET /v1/server": Operation(server.ServerObject | server.FrontServer, query={"model": {"type": "string"}}),
    "GET /health": Operation(server.Health),
    "GET /ping": Operation(server.Health),
    "POST /ping": Operation(server.Health),
    "GET /metrics": Operation(media_type="text/plain"),
    "GET /version": Operation(server.Version),
    "GET /openapi.json": Operation(dict[str, Any]),
    "GET /docs": Operation(media_type="text/html"),
    "GET /": Operation(media_type="text/html", others=_UNCHANGED),
    "GET /page/{name}": Operation(media_type="*/*", others=_UNCHANGED),
}
"""By method and path of the route table. HEAD is GET without the content."""

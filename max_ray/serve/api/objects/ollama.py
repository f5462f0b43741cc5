"""Answers of Ollama's routes. Times are in nanoseconds."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict


class OllamaCalledFunction(TypedDict):
    """The function of a call."""

    name: str
    arguments: dict[str, Any]


class OllamaAnsweredCall(TypedDict):
    """A call that the model made."""

    function: OllamaCalledFunction


class OllamaAnswerMessage(TypedDict):
    """The message of a chat's answer."""

    role: Literal["assistant"]
    content: str
    thinking: NotRequired[str]
    tool_calls: NotRequired[list[OllamaAnsweredCall]]


class OllamaAnswer(TypedDict):
    """What the answers of both routes have. The numbers are missing where a model was only to be loaded."""

    model: str
    created_at: str
    done: Literal[True]
    done_reason: Literal["stop", "length", "load"]
    total_duration: NotRequired[int]
    load_duration: NotRequired[int]
    prompt_eval_count: NotRequired[int]
    prompt_eval_duration: NotRequired[int]
    eval_count: NotRequired[int]
    eval_duration: NotRequired[int]


class OllamaChatAnswer(OllamaAnswer):
    """The answer of `/api/chat`."""

    message: OllamaAnswerMessage


class OllamaGenerateAnswer(OllamaAnswer):
    """The answer of `/api/generate`."""

    response: str
    thinking: NotRequired[str]


class OllamaEmbeddings(TypedDict):
    """The answer of `/api/embed`."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaModelDetails(TypedDict):
    """Of a model's weights."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModelEntry(TypedDict):
    """A model, without a time."""

    name: str
    model: str
    size: int
    digest: str
    details: OllamaModelDetails


class OllamaModel(OllamaModelEntry):
    """A model as lists have it."""

    modified_at: str


class OllamaModelList(TypedDict):
    """The answer of `/api/tags`."""

    models: list[OllamaModel]


class OllamaRunningModel(OllamaModel):
    """A model that is loaded."""

    expires_at: str
    size_vram: int
    context_length: int


class OllamaRunningModelList(TypedDict):
    """The answer of `/api/ps`."""

    models: list[OllamaRunningModel]


class OllamaModelDescription(TypedDict):
    """What a model is and can do."""

    modelfile: str
    parameters: str
    template: str
    details: OllamaModelDetails
    model_info: dict[str, str | int]
    capabilities: list[str]


class OllamaShownModel(OllamaModelDescription):
    """The answer of `/api/show`."""

    modified_at: str

"""Answers of OpenAI's routes of generation, embeddings and models, and of the routes that other servers add to them."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict


class PromptTokensDetails(TypedDict):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class UsageObject(TypedDict):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class InputUsage(TypedDict):
    """Token counts of a request that generates nothing."""

    prompt_tokens: int
    total_tokens: int


class TopLogprob(TypedDict):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, with its likeliest alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log probabilities of a chat's answer."""

    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(TypedDict):
    """Log probabilities of a completion, as four parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(TypedDict):
    """The log probability of a token of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""One entry a token of the prompt, by token id."""
FinishReason = Literal["stop", "length", "tool_calls"]


class AnsweredFunction(TypedDict):
    """The function of a call. The arguments are JSON text."""

    name: str
    arguments: str


class AnsweredCall(TypedDict):
    """A call that the model made."""

    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnswerMessage(TypedDict):
    """The message of a chat's answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[AnsweredCall]]


class ChatChoice(TypedDict):
    """One answer to a chat."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: NotRequired[list[int] | None]


class CompletionChoice(TypedDict):
    """One continuation of a prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    prompt_token_ids: NotRequired[list[int]]
    token_ids: NotRequired[list[int] | None]
    prompt_logprobs: NotRequired[PromptLogprobs]


class ChatCompletion(TypedDict):
    """The answer of `/v1/chat/completions`."""

    object: Literal["chat.completion"]
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageObject
    timings: NotRequired[dict[str, float]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class Completion(TypedDict):
    """The answer of `/v1/completions`."""

    object: Literal["text_completion"]
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageObject
    timings: NotRequired[dict[str, float]]


class EmbeddingObject(TypedDict):
    """The vector of a text: numbers, or base64 of little-endian float32 numbers."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(TypedDict):
    """The answer of `/v1/embeddings`."""

    object: Literal["list"]
    data: list[EmbeddingObject]
    model: str
    usage: InputUsage


class ModelObject(TypedDict):
    """The served model. Template and parsers are of models that generate text, `state` of a server of several."""

    id: str
    aliases: list[str]
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    task: str
    modalities: list[str]
    chat_template: NotRequired[dict[str, Any] | None]
    tool_call_parser: NotRequired[str]
    reasoning_parser: NotRequired[str]
    state: NotRequired[str]


class ModelList(TypedDict):
    """The answer of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelObject]


class ScoreObject(TypedDict):
    """The score of a pair of texts."""

    index: int
    object: Literal["score"]
    score: float


class ScoreList(TypedDict):
    """The answer of `/v1/score`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoreObject]
    usage: InputUsage


class RankedText(TypedDict):
    """A document."""

    text: str


class RankedDocument(TypedDict):
    """A document's place in the given list, and its relevance to the query."""

    index: int
    relevance_score: float
    document: NotRequired[RankedText]


class RerankResult(TypedDict):
    """The answer of `/v1/rerank`: the best documents first."""

    id: str
    model: str
    usage: InputUsage
    results: list[RankedDocument]


class TokenizedPrompt(TypedDict):
    """The answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedPrompt(TypedDict):
    """The answer of `/detokenize`."""

    prompt: str


class AddedToken(TypedDict):
    """A token that was added to the vocabulary."""

    content: str
    special: bool


class TokenizerInfo(TypedDict):
    """The answer of `/tokenizer_info`."""

    tokenizer_class: str
    chat_template: str | dict[str, str] | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    cls_token: str | None
    sep_token: str | None
    mask_token: str | None
    eos_token_ids: list[int]
    model_max_length: int
    vocab_size: int
    added_tokens_decoder: dict[str, AddedToken]

"""Tables of fields that are not honoured: with which values each asks for nothing, and what to use instead.

The names are those of the OpenAI API, vLLM, SGLang, llama.cpp's server and text-generation web UIs. A field that is
honoured from now on moves from here to the request's model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from max_ray.serve.api.request_fields import Neutral, foreign, foreign_number, only


def _is_best_of(given: Any, request: Mapping[str, Any]) -> bool:
    """As many choices are made as are returned."""
    n = request.get("n")
    return type(given) is int and given in (1, 1 if n is None else n)


def _is_cache_hint(given: Any, _: Mapping[str, Any]) -> bool:
    """Anthropic's mark for its prompt cache. Ours keeps every prefix, marked or not."""
    if not isinstance(given, dict) or not {"type"} <= given.keys() <= {"type", "ttl"}:
        return False
    return bool(given["type"] == "ephemeral") and given.get("ttl") in (None, "5m", "1h")


CACHE_CONTROL = Neutral(
    _is_cache_hint,
    '{"type": "ephemeral"}',
    is_foreign=True,
    schema={
        "type": ["object", "null"],
        "properties": {"type": {"const": "ephemeral"}, "ttl": {"enum": ["5m", "1h", None]}},
        "required": ["type"],
        "additionalProperties": False,
    },
)
_WHOLE_NUMBER = {"type": ["integer", "null"]}

_CHAT_TOOLS = "/v1/chat/completions has it."
_NO_BEAMS = "There is no beam search: tokens are sampled. Use best_of of /v1/completions for the likeliest of several."
_TOKENS = "Use 'max_tokens'."

ANY_REQUEST: dict[str, Neutral] = {
    "prompt_cache_options": only(),
    "prompt_cache_retention": only("in_memory", "in-memory"),
    "service_tier": only("auto", "default"),
    "store": only(False),
    # vLLM, SGLang
}

GENERATION: dict[str, Neutral] = ANY_REQUEST | {
    "function_call": only("none", "auto", instead="Use 'tool_choice'."),
    "functions": only([], instead="Use 'tools'."),
    "moderation": only(),
    # vLLM, SGLang
    "detokenize": foreign(True),
    "guided_decoding_backend": foreign("auto", "guidance"),
    "guided_whitespace_pattern": foreign(),
    "kv_transfer_params": foreign(),
    "length_penalty": foreign(1.0, instead=_NO_BEAMS),
    "logits_processors": foreign([]),
    "lora_path": foreign(),
    "no_stop_trim": foreign(False),
    "return_hidden_states": foreign(False),
    "spaces_between_special_tokens": foreign(True, False),  # the detokenizer writes none, with either
    "use_beam_search": foreign(False, instead=_NO_BEAMS),
    "vllm_xargs": foreign({}),
    # llama.cpp and web UIs: samplers that are off, and the shapes of samplers that are off
    "cache_prompt": foreign(True),
    "dynatemp_exponent": foreign_number(),
    "dynatemp_range": foreign(0),
    "epsilon_cutoff": foreign(0),
    "eta_cutoff": foreign(0),
    "format": foreign(""),
    "guidance_scale": foreign(1),
    "id_slot": foreign(-1),
    "image_data": foreign([]),
    "keep_alive": foreign(),
    "lora": foreign([]),
    "min_keep": foreign(0),
    "mirostat": foreign(0),
    "mirostat_eta": foreign_number(),
    "mirostat_mode": foreign(0),
    "mirostat_tau": foreign_number(),
    "n_keep": foreign(0),
    "no_repeat_ngram_size": foreign(0),
    "num_beams": foreign(1, instead=_NO_BEAMS),
    "options": foreign({}),
    "post_sampling_probs": foreign(False),
    "response_fields": foreign([]),
    "return_progress": foreign(False),
    "return_tokens": foreign(False),
    "samplers": foreign(),
    "tfs_z": foreign(1),
    "top_a": foreign(0),
    "top_n_sigma": foreign(-1, 0),
}

COMPLETION: dict[str, Neutral] = GENERATION | {
    "parallel_tool_calls": only(True, False),
    "tool_choice": only("none", "auto", instead=_CHAT_TOOLS),
    "tools": only([], instead=_CHAT_TOOLS),
    "prompt_embeds": foreign(),
}

CHAT: dict[str, Neutral] = GENERATION | {
    "audio": only(),
    "best_of": Neutral(
        _is_best_of, "1 or the value of n", instead="/v1/completions has it.", schema={"enum": [1, None]}
    ),
    "modalities": only(["text"]),
    "prediction": only(),
    "web_search_options": only(),
    "add_special_tokens": foreign(False),  # the chat template writes them
    "chat_template": foreign(),
    "mm_processor_kwargs": foreign({}),
    "think": foreign(),
}

EMBEDDINGS: dict[str, Neutral] = ANY_REQUEST | {
    "request_id": foreign(),
    "rid": foreign(),
    "truncate_prompt_tokens": foreign(),
    "add_special_tokens": foreign(True),
    "cache_salt": foreign(),
    "embed_dtype": foreign("float32"),
    "endianness": foreign("native", "little"),
    "input_type": foreign(),
    "mm_processor_kwargs": foreign({}),
    "normalize": foreign(),
    "priority": foreign(0),
}

SCORES: dict[str, Neutral] = ANY_REQUEST | {
    "add_special_tokens": foreign(True),
    "activation": foreign(True),
    "use_activation": foreign(True),
    "max_chunks_per_doc": foreign(),
    "max_tokens_per_doc": foreign(instead="Use 'truncate_prompt_tokens'."),
    "mm_processor_kwargs": foreign({}),
    "rank_fields": foreign(["text"]),
    "softmax": foreign(),
}

STREAM_OPTIONS: dict[str, Neutral] = {
    "include_obfuscation": only(False),
}

MESSAGE: dict[str, Neutral] = {
    "annotations": only([]),
    "audio": only(),
    "function_call": only(instead="Use 'tool_calls'."),
    "parsed": only(),
    "refusal": only(),
    "cache_control": CACHE_CONTROL,
    "partial": foreign(False),
    "prefix": foreign(False),
}

TOOL_CALL: dict[str, Neutral] = {
    "index": Neutral(
        lambda given, _: type(given) is int, "a number", schema=_WHOLE_NUMBER
    ),  # of a streamed call that was put together
}

CALLED_FUNCTION: dict[str, Neutral] = {
    "parsed_arguments": Neutral(
        lambda *_: True, "anything", schema={}
    ),  # the openai package puts it beside `arguments`
}

PART: dict[str, Neutral] = {
    "annotations": only([]),
    "prompt_cache_breakpoint": only(),
    "cache_control": CACHE_CONTROL,
}

# What an unknown name stands for. Near names are found without a table.
GENERATION_INSTEAD: dict[str, str] = {
    "do_sample": "Use 'temperature': 0 is greedy.",
    "max_length": _TOKENS,
    "max_new_tokens": _TOKENS,
    "max_output_tokens": _TOKENS,
    "max_tokens_to_sample": _TOKENS,
    "min_length": "Use 'min_tokens'.",
    "min_new_tokens": "Use 'min_tokens'.",
    "typical": "Use 'typical_p'.",
    "num_ctx": "The server is started with --max-length.",
    "num_predict": _TOKENS,
    "num_return_sequences": "Use 'n'.",
    "random_seed": "Use 'seed'.",
    "stop_sequences": "Use 'stop'.",
    "stop_strings": "Use 'stop'.",
    "stop_words": "Use 'stop'.",
}
COMPLETION_INSTEAD: dict[str, str] = GENERATION_INSTEAD | {
    "inputs": "Use 'prompt'.",
    "max_completion_tokens": _TOKENS,
    "messages": "Messages go to /v1/chat/completions.",
    "top_logprobs": "Use 'logprobs'.",
}
CHAT_INSTEAD: dict[str, str] = GENERATION_INSTEAD | {
    "input": "Use 'messages'.",
    "instructions": "Send a message of the role 'system'.",
    "prompt": "Send it as a message of 'messages', or to /v1/completions.",
    "system": "Send a message of the role 'system'.",
}
EMBEDDINGS_INSTEAD: dict[str, str] = {"messages": "Use 'input'.", "prompt": "Use 'input'.", "texts": "Use 'input'."}

_CHAT = "Use /v1/chat/completions."
_COMPLETIONS = "Use /v1/completions."
_ONE_MODEL = "This server serves the model that it was started with, and no other."
ROUTES_INSTEAD: dict[str, str] = {
    "/responses": "Use /v1/responses.",
    "/messages": "Use /v1/messages.",
    "/v1/chat": _CHAT,
    "/chat": _CHAT,
    "/chat/completions": _CHAT,
    "/completions": _COMPLETIONS,
    "/completion": _COMPLETIONS,
    "/generate": _COMPLETIONS,
    "/generate_stream": _COMPLETIONS,
    "/infill": "Use 'suffix' of /v1/completions.",
    "/v1/engines/completions": _COMPLETIONS,
    "/embeddings": "Use /v1/embeddings.",
    "/embed": "Use /v1/embeddings.",
    "/embedding": "Use /v1/embeddings.",
    "/api/embed": "Use /v1/embeddings.",
    "/api/embeddings": "Use /api/embed.",
    "/models": "Use /v1/models.",
    **dict.fromkeys(("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete"), _ONE_MODEL),
    "/v1": "Its routes are /v1/models, /v1/completions, /v1/chat/completions and /v1/embeddings.",
    "/healthz": "Use /health.",
    "/ready": "Use /health.",
}
"""What an unknown path stands for on other servers."""

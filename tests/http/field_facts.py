"""What other servers document, which test shows the effect of each field that is honoured, and why others are not.

`field_table` puts it together with the code. Names of OpenAI's fields come from the pinned `openai` package; those of
vLLM and llama.cpp's server from their documentation of November 2026.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from openai.types import embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.completion_create_params import CompletionCreateParamsBase
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from max_ray.serve.api.request_fields import ApiRequest
from max_ray.serve.api.routes import BODIES

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, EMBEDDINGS = "/v1/responses", "/v1/embeddings"
MODELS: dict[str, type[ApiRequest]] = {path: BODIES[path] for path in (COMPLETIONS, CHAT, RESPONSES, EMBEDDINGS)}
OPENAI: dict[str, list[str]] = {
    COMPLETIONS: [*CompletionCreateParamsBase.__annotations__, "stream"],
    CHAT: [*chat_params.CompletionCreateParamsBase.__annotations__, "stream"],
    RESPONSES: [*ResponseCreateParamsBase.__annotations__, "stream"],
    EMBEDDINGS: [*embedding_create_params.EmbeddingCreateParams.__annotations__],
}
_VLLM_BOTH = [
    "use_beam_search",
    "top_k",
    "min_p",
    "repetition_penalty",
    "watermarking",
    "length_penalty",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
    "prompt_logprobs",
    "logprob_token_ids",
    "allowed_token_ids",
    "bad_words",
    "add_special_tokens",
    "response_format",
    "structured_outputs",
    "priority",
    "request_id",
    "session_id",
    "return_tokens_as_token_ids",
    "return_token_ids",
    "routed_experts_prompt_start",
    "return_token_offsets",
    "cache_salt",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "repetition_detection",
    "thinking_token_budget",
    "stream_interval",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "logits_processors",
    "detokenize",
    "best_of",
]
VLLM: dict[str, list[str]] = {
    COMPLETIONS: [*_VLLM_BOTH, "prompt_embeds"],
    CHAT: [
        *_VLLM_BOTH,
        *["include_reasoning", "echo", "add_generation_prompt", "continue_final_message", "documents", "chat_template"],
        *["chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs", "return_prompt_text"],
    ],
    RESPONSES: ["request_id", "top_k", "repetition_penalty", "priority", "cache_salt", "include_stop_str_in_output"],
    EMBEDDINGS: [
        "truncate_prompt_tokens",
        "add_special_tokens",
        "priority",
        "request_id",
        "normalize",
        "embed_dtype",
        "endianness",
    ],
}
_LLAMA_BOTH = [
    "dynatemp_range",
    "dynatemp_exponent",
    "top_k",
    "min_p",
    "n_predict",
    "n_indent",
    "n_keep",
    "n_cmpl",
    "n_cache_reuse",
    "typical_p",
    "repeat_penalty",
    "repeat_last_n",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
    "xtc_probability",
    "xtc_threshold",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
    "grammar",
    "json_schema",
    "ignore_eos",
    "n_probs",
    "min_keep",
    "t_max_predict_ms",
    "id_slot",
    "cache_prompt",
    "return_tokens",
    "samplers",
    "timings_per_token",
    "return_progress",
    "sse_ping_interval",
    "post_sampling_probs",
    "response_fields",
    "lora",
]
LLAMA_CPP: dict[str, list[str]] = {
    COMPLETIONS: _LLAMA_BOTH,
    CHAT: [*_LLAMA_BOTH, "chat_template_kwargs", "reasoning_format", "parse_tool_calls"],
    RESPONSES: [],
    EMBEDDINGS: [],
}
SERVERS = {"OpenAI": OPENAI, "vLLM": VLLM, "llama.cpp": LLAMA_CPP}

LABELS = ("user", "safety_identifier", "prompt_cache_key", "metadata")
"""Fields that are checked and kept with the request, and change nothing in the answer."""


class Effect(NamedTuple):
    """A field that is honoured: the test that shows what it changes, a value, and fields that the value needs."""

    test: str
    value: Any
    beside: Mapping[str, Any] = MappingProxyType({})


_COMPLETE, _CHAT, _EXTRA = "http/test_completions.py", "http/test_chat.py", "http/test_extension_fields.py"
_SAMPLER, _GRAMMAR, _REASON = "engine/test_sampler.py", "http/test_structured_output.py", "http/test_reasoning.py"
_CONTROLS, _PRIORITY = "engine/test_logit_controls.py", "scheduler/test_priorities.py"
_DRY = f"{_CONTROLS}::test_dry_takes_more_from_longer_repetitions"
_ALL_CONTROLS = f"{_CONTROLS}::test_mixed_batches_equal_the_naive_sampler"
_NAIVE = f"{_SAMPLER}::test_mixed_batch_equals_the_naive_sampler_over_many_steps"
_PENALTIES = f"{_SAMPLER}::test_penalties_equal_the_naive_ones"
_NAMES = f"{_GRAMMAR}::test_every_name_reaches_the_engine"
_SCHEMA = {"type": "object"}
_TOOL = {"type": "function", "function": {"name": "f"}}
BOTH: dict[str, Effect] = {
    "model": Effect("http/test_field_table.py::test_a_model_that_is_not_served", "fake"),
    "stream": Effect(f"{_COMPLETE}::test_stream_is_byte_exact", True),
    "stream_options": Effect(f"{_COMPLETE}::test_usage_in_a_stream", {"include_usage": True}, {"stream": True}),
    "n": Effect(f"{_COMPLETE}::test_n_choices_of_several_prompts", 2),
    "n_cmpl": Effect(f"{_EXTRA}::test_aliases", 2),
    **{name: Effect(_NAIVE, value) for name, value in (("temperature", 0.5), ("top_p", 0.5), ("top_k", 3))},
    "min_p": Effect(_NAIVE, 0.1),
    "frequency_penalty": Effect(_PENALTIES, 0.5),
    "presence_penalty": Effect(_PENALTIES, 0.5),
    "repetition_penalty": Effect(_PENALTIES, 1.5),
    "repeat_penalty": Effect(f"{_EXTRA}::test_aliases", 1.5),
    "seed": Effect(f"{_SAMPLER}::test_seeds_matter_and_repeat", 5),
    "stop": Effect(f"{_COMPLETE}::test_stop_strings", "x"),
    "stop_token_ids": Effect(f"{_COMPLETE}::test_stop_token_is_not_in_the_text", [9]),
    "min_tokens": Effect(f"{_SAMPLER}::test_min_tokens_mask_ends_with_the_minimum", 1),
    "ignore_eos": Effect(f"{_COMPLETE}::test_ignore_eos", True, {"max_tokens": 3}),
    "include_stop_str_in_output": Effect(f"{_EXTRA}::test_include_stop_str_in_output", True),
    "skip_special_tokens": Effect(f"{_EXTRA}::test_skip_special_tokens", False),
    "truncate_prompt_tokens": Effect(f"{_EXTRA}::test_truncate_prompt_tokens", 2),
    "truncation_side": Effect(f"{_EXTRA}::test_truncate_prompt_tokens", "right", {"truncate_prompt_tokens": 2}),
    "return_token_ids": Effect(f"{_EXTRA}::test_return_token_ids", True),
    "return_tokens_as_token_ids": Effect(f"{_EXTRA}::test_return_tokens_as_token_ids", True),
    "timings_per_token": Effect(f"{_EXTRA}::test_timings_per_token", True),
    "t_max_predict_ms": Effect(f"{_EXTRA}::test_t_max_predict_ms", 5),
    "timeout": Effect(f"{_EXTRA}::test_timeout", 5),
    "request_id": Effect(f"{_EXTRA}::test_request_id", "x"),
    "rid": Effect(f"{_EXTRA}::test_request_id", "x"),
    "n_predict": Effect(f"{_EXTRA}::test_aliases", 2),
    "n_probs": Effect(f"{_EXTRA}::test_aliases", 2),
    "logit_bias": Effect(f"{_CONTROLS}::test_a_bias_is_added_before_the_penalties", {"5": 1}),
    "allowed_token_ids": Effect(f"{_CONTROLS}::test_only_allowed_tokens_come", [5, 6]),
    "bad_words": Effect(f"{_CONTROLS}::test_a_bad_word_is_forbidden_behind_its_beginning_alone", ["ab"]),
    "repeat_last_n": Effect(f"{_CONTROLS}::test_penalties_of_a_window", 5),
    "dry_multiplier": Effect(_DRY, 0.5),
    "dry_base": Effect(_DRY, 1.5),
    "dry_allowed_length": Effect(_DRY, 3),
    "dry_penalty_last_n": Effect(_ALL_CONTROLS, 50),
    "dry_sequence_breakers": Effect(f"{_CONTROLS}::test_a_breaker_ends_repetitions", ["x"]),
    "typical_p": Effect(f"{_CONTROLS}::test_typical_sampling_leaves_out_the_likeliest_token_too", 0.5),
    "xtc_probability": Effect(f"{_CONTROLS}::test_xtc_applies_as_often_as_it_is_told_to", 0.5),
    "xtc_threshold": Effect(f"{_CONTROLS}::test_xtc_removes_all_top_tokens_but_the_least_likely", 0.2),
    "prompt_logprobs": Effect("http/test_logit_fields.py::test_prompt_logprobs_of_a_completion", 2),
    "priority": Effect(f"{_PRIORITY}::test_requests_run_by_priority_and_equal_ones_in_order", 1),
    "cache_salt": Effect(f"{_PRIORITY}::test_a_cached_prefix_is_found_under_its_salt_alone", "x"),
    "response_format": Effect(f"{_GRAMMAR}::test_a_streamed_schema", {"type": "json_object"}),
    "structured_outputs": Effect(_NAMES, {"json": _SCHEMA}),
    **{name: Effect(_NAMES, _SCHEMA) for name in ("guided_json", "json_schema")},
    **{name: Effect(_NAMES, "a+") for name in ("guided_regex", "regex")},
    "guided_choice": Effect(_NAMES, ["a"]),
    **{name: Effect(_NAMES, 'root ::= "a"') for name in ("guided_grammar", "ebnf", "grammar")},
    "guided_json_object": Effect(_NAMES, True),
    "structural_tag": Effect(
        _NAMES, {"triggers": ["<f"], "structures": [{"begin": "<f>", "schema": _SCHEMA, "end": "</f>"}]}
    ),
}
_LIMIT = f"{_CHAT}::test_both_names_of_the_limit"
_BUDGET = "http/test_reasoning_budget.py::test_a_real_model_keeps_its_budget_and_answers_by_the_schema"
_BEGUN = {
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I "}],
    "continue_final_message": True,
}
_FORCED, _TOOLS = "http/test_forced_tools.py", "http/test_tools.py"
_RESPONSES, _VECTORS = "http/test_responses.py", "embeddings/test_http.py"
EFFECTS: dict[str, dict[str, Effect]] = {
    COMPLETIONS: {
        **BOTH,
        "prompt": Effect(f"{_COMPLETE}::test_prompt_forms", "ab"),
        "max_tokens": Effect(f"{_COMPLETE}::test_max_tokens_is_a_limit_that_the_model_length_may_undercut", 2),
        "logprobs": Effect(f"{_COMPLETE}::test_log_probabilities", 1),
        "echo": Effect(f"{_COMPLETE}::test_echo", True),
        "best_of": Effect(f"{_EXTRA}::test_best_of", 2),
        "suffix": Effect("http/test_infill.py::test_each_familys_order", "x"),
        "add_special_tokens": Effect(f"{_EXTRA}::test_add_special_tokens", False),
    },
    CHAT: {
        **BOTH,
        "messages": Effect(f"{_CHAT}::test_message_forms", [{"role": "user", "content": "hi"}]),
        "max_tokens": Effect(_LIMIT, 2),
        "max_completion_tokens": Effect(_LIMIT, 2),
        "logprobs": Effect(f"{_CHAT}::test_log_probabilities", True),
        "top_logprobs": Effect(f"{_CHAT}::test_log_probabilities", 2, {"logprobs": True}),
        "echo": Effect(f"{_EXTRA}::test_echo_of_a_chat", True, _BEGUN),
        "tools": Effect(f"{_TOOLS}::test_a_whole_answer", [_TOOL]),
        "tool_choice": Effect(f"{_FORCED}::test_a_named_function", "required", {"tools": [_TOOL]}),
        "parallel_tool_calls": Effect(f"{_TOOLS}::test_one_call_at_most", False),
        "include_reasoning": Effect(f"{_REASON}::test_it_may_be_left_out_or_in_the_text", False),
        "reasoning_format": Effect(f"{_REASON}::test_it_may_be_left_out_or_in_the_text", "none"),
        "reasoning_effort": Effect(f"{_REASON}::test_options_that_a_template_reads", "none"),
        "verbosity": Effect(f"{_REASON}::test_options_that_a_template_reads", "medium"),
        "thinking_token_budget": Effect(_BUDGET, -1),
        "max_thinking_tokens": Effect(_BUDGET, -1),
        "chat_template_kwargs": Effect(f"{_REASON}::test_options_that_a_template_reads", {}),
        "documents": Effect(f"{_REASON}::test_options_that_a_template_reads", []),
        "add_generation_prompt": Effect(f"{_REASON}::test_the_generation_prompt", True),
        "continue_final_message": Effect(
            f"{_REASON}::test_the_last_message_is_continued", True, {"messages": _BEGUN["messages"]}
        ),
    },
    RESPONSES: {
        "model": BOTH["model"],
        "input": Effect(f"{_RESPONSES}::test_forms_of_input", "hi"),
        "instructions": Effect(f"{_RESPONSES}::test_instructions_are_of_one_response", "x"),
        "previous_response_id": Effect(f"{_RESPONSES}::test_a_conversation_over_two_replicas", None),
        "store": Effect(f"{_RESPONSES}::test_what_is_not_stored_or_deleted_is_not_found", False),
        "background": Effect(f"{_RESPONSES}::test_a_background_response", True),
        "stream": Effect(f"{_RESPONSES}::test_the_events_of_a_stream", True),
        "max_output_tokens": Effect(f"{_RESPONSES}::test_an_incomplete_response", 2),
        **{name: BOTH[name] for name in ("temperature", "top_p", "top_k", "seed")},
        "text": Effect("http/test_dialect_tools.py::test_dialects_tell_the_same_answers", {"format": {"type": "text"}}),
        "reasoning": Effect("http/test_dialect_tools.py::test_dialects_tell_the_same_answers", {}),
        "tools": Effect("http/test_dialect_tools.py::test_responses_stream", [{"type": "function", "name": "f"}]),
        "tool_choice": Effect("http/test_dialect_tools.py::test_responses_stream", "none"),
        "parallel_tool_calls": Effect("http/test_dialect_tools.py::test_responses_stream", True),
        "truncation": Effect(f"{_RESPONSES}::test_truncation_leaves_out_as_few_messages_as_possible", "auto"),
    },
    EMBEDDINGS: {
        "model": BOTH["model"],
        "input": Effect(f"{_VECTORS}::test_every_form_of_input_gives_the_vectors_of_transformers", "a"),
        "encoding_format": Effect(f"{_VECTORS}::test_base64_is_little_endian_float32", "base64"),
        "dimensions": Effect(f"{_VECTORS}::test_dimensions_cut_and_scale_again", 2),
        "truncate": Effect(f"{_VECTORS}::test_truncate", True),
    },
}
REASONS: dict[str, str] = {
    **dict.fromkeys(("audio", "modalities"), "Answers are text."),
    **dict.fromkeys(("prompt_embeds", "mm_processor_kwargs", "media_io_kwargs"), "Prompts are texts, ids and images."),
    **dict.fromkeys(("lora", "lora_path"), "No adapters are served."),
    **dict.fromkeys(("kv_transfer_params", "ec_transfer_params"), "Caches are not moved between servers by clients."),
    **dict.fromkeys(("samplers", "min_keep"), "The order of the samplers is fixed."),
    **dict.fromkeys(("n_keep", "n_indent", "n_cache_reuse"), "A context is not shifted: its length ends the answer."),
    **dict.fromkeys(("mirostat", "mirostat_tau", "mirostat_eta"), "Use top_p or min_p."),
    **dict.fromkeys(("dynatemp_range", "dynatemp_exponent"), "The temperature is fixed for a request."),
    **dict.fromkeys(("context_management", "conversation", "prompt"), "Use previous_response_id."),
    **dict.fromkeys(("moderation", "access_programs"), "A service of OpenAI."),
    **dict.fromkeys(("prompt_cache_options", "prompt_cache_retention"), "Every prefix is cached while there is room."),
    **dict.fromkeys(("return_token_offsets", "return_prompt_text"), "Use /tokenize and return_token_ids."),
    **dict.fromkeys(("stream_interval", "sse_ping_interval"), "Each step's tokens go out at once."),
    **dict.fromkeys(("repetition_detection", "watermarking"), "Not implemented."),
    "background_options": "A background response ends when it is done.",
    "cache_prompt": "Prefixes of prompts are always cached.",
    "chat_template": "The template is the model's.",
    "detokenize": "Answers are text; return_token_ids adds the ids.",
    "guided_decoding_backend": "There is one.",
    "guided_whitespace_pattern": "Use structured_outputs.disable_any_whitespace.",
    "id_slot": "Requests have no slots.",
    "image": "Images are not made.",
    "include": "Nothing of it exists here.",
    "include_stop_str_in_output": "Use /v1/chat/completions.",
    "logits_processors": "Clients run no code here.",
    "max_tool_calls": "This server runs no tools.",
    "parse_tool_calls": "Use tool_choice.",
    "post_sampling_probs": "Log probabilities are those before temperature.",
    "prediction": "There is no predicted output.",
    "repetition_penalty": "Use /v1/chat/completions.",
    "response_fields": "Answers are whole.",
    "return_progress": "Not implemented.",
    "return_tokens": "Use return_token_ids.",
    "routed_experts_prompt_start": "Routing of experts is not reported.",
    "service_tier": "There is one tier.",
    "session_id": "Use user or metadata.",
    "store": "Chats are not stored; /v1/responses stores.",
    "stream_options": "Nothing in it changes a stream.",
    "cache_salt": "The prefix cache is shared.",
    "input_type": "Inputs are encoded alike.",
    "keep_alive": "The model stays as long as the server runs.",
    "logprob_token_ids": "Use top_logprobs.",
    "normalize": "Vectors are as the model's files say.",
    "priority": "Requests are served in order.",
    "request_id": "The answer's id is the server's.",
    "rid": "The answer's id is the server's.",
    "think": "Use reasoning_effort.",
    "thinking_token_budget": "Use /v1/chat/completions.",
    "truncate_prompt_tokens": "Use truncate.",
    "vllm_xargs": "There are no extensions.",
    "web_search_options": "This server searches nothing.",
}
"""Why a field is not honoured, where the code has no sentence for it."""

_OPENAI_ROUTES = """
    POST /v1/completions, POST /v1/chat/completions, GET /v1/chat/completions, POST /v1/embeddings, GET /v1/models,
    GET /v1/models/{model}, DELETE /v1/models/{model}, POST /v1/responses, GET /v1/responses/{response_id},
    DELETE /v1/responses/{response_id}, POST /v1/responses/{response_id}/cancel,
    GET /v1/responses/{response_id}/input_items, POST /v1/responses/input_tokens, POST /v1/responses/compact,
    POST /v1/batches, GET /v1/batches, POST /v1/files, GET /v1/files, POST /v1/moderations, POST /v1/images/generations,
    POST /v1/audio/speech, POST /v1/audio/transcriptions, POST /v1/conversations, POST /v1/fine_tuning/jobs
"""
_VLLM_ROUTES = """
    POST /tokenize, POST /detokenize, GET /tokenizer_info, GET /health, GET /ping, POST /ping, GET /version,
    GET /metrics, GET /load, POST /v1/messages, POST /v1/messages/count_tokens, POST /pooling, POST /classify,
    POST /score, POST /v1/score, POST /rerank, POST /v1/rerank, POST /v2/rerank, POST /v1/audio/transcriptions,
    POST /v1/load_lora_adapter, POST /v1/completions/render, POST /v1/chat/completions/render, POST /invocations
"""
_LLAMA_ROUTES = """
    GET /health, GET /v1/health, POST /completion, POST /completions, POST /tokenize, POST /detokenize,
    POST /apply-template, POST /embedding, POST /embeddings, POST /reranking, POST /infill, GET /props, POST /props,
    GET /slots, GET /metrics, GET /lora-adapters, POST /lora-adapters, GET /models, POST /v1/messages,
    POST /v1/messages/count_tokens, POST /v1/responses, POST /api/chat, GET /api/tags, POST /api/show
"""
ROUTES_OF = {
    server: [" ".join(one.split()) for one in text.strip().split(",")]
    for server, text in (("OpenAI", _OPENAI_ROUTES), ("vLLM", _VLLM_ROUTES), ("llama.cpp", _LLAMA_ROUTES))
}
ROUTE_REASONS: dict[str, str] = {
    "lora": "No adapters are served.",
    "render": "Use /tokenize.",
    "apply-template": "Use /tokenize with messages.",
    "rank": "Not implemented.",
    "score": "Not implemented.",
    "batches": "Not implemented.",
    "files": "Not implemented.",
    "images": "Images are not made.",
    "audio": "Audio is not made or read.",
    "slots": "Requests have no slots; /metrics has the numbers.",
    "props": "Use /v1/models/{model}.",
    "load": "Use /metrics.",
    "pooling": "Use /v1/embeddings.",
    "classify": "Not implemented.",
    "conversations": "Use previous_response_id of /v1/responses.",
    "input_tokens": "Use /tokenize.",
    "compact": "Not implemented.",
    "moderations": "A service of OpenAI.",
    "fine_tuning": "Models are not trained here.",
    "invocations": "Use the route itself.",
    "/v1/health": "Use /health.",
    "GET /v1/chat/completions": "Chats are not stored; /v1/responses stores.",
    "DELETE /v1/models": "The served model stays as long as the server runs.",
}
"""Why a route is not there, by a part of its name; the first that fits counts."""

"""GGUF keys as the values of a Hugging Face config.json, so that model families read one kind of configuration.

Names of keys: the ggml project's docs/gguf.md; `{arch}` is general.architecture, and keys below it begin with its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from max_ray.errors import ArchitectureNotFoundError, WeightsError
from max_ray.gguf.encoders import bert_values, modern_bert_values
from max_ray.gguf.file import GgufFile, GgufTensor
from max_ray.gguf.keys import Keys
from max_ray.gguf.rope import rope_values
from max_ray.gguf.strings import StringArray

_GEMMA3_27B_LAYERS = 62
_COUNTS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "attention.key_length": "head_dim",
}
_OPTIONAL = ("attention.head_count_kv", "attention.key_length")
_END_NAMES = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>")
Values = dict[str, Any]


def huggingface_values(file: GgufFile) -> Values:
    """config.json's values for the model in `file`. Raises WeightsError for keys that are missing, that cannot work, or
    that change numbers and have no meaning in the family; ArchitectureNotFoundError for a kind of model that no family
    here reads from GGUF."""
    arch = file.architecture
    if arch not in _KINDS:
        known = ", ".join(sorted(_KINDS))
        raise ArchitectureNotFoundError(f"{file.path} is of the kind {arch!r}; kinds that can be read: {known}.")
    keys = Keys(file)
    values: Values = {"model_type": arch}
    values |= {name: count for key, name in _COUNTS.items() if (count := keys.count(key, key in _OPTIONAL)) is not None}
    values["rms_norm_eps"] = keys.positive("attention.layer_norm_rms_epsilon", 1e-6)
    values["vocab_size"] = _vocab_size(file)
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    values["dtype"] = stored_encoding(file.tensors)
    values |= _KINDS[arch](file, keys, values)
    keys.refuse_unread(has_experts=keys.get("expert_count") not in (None, 0))
    return values | _special_ids(file.metadata)


def _llama(file: GgufFile, keys: Keys, values: Values) -> Values:
    """A Llama; a Mistral where there is a sliding window; a Mixtral where there are experts."""
    made = _plain_heads(file, keys, values)
    window, experts = _window(keys, values), _experts(keys)
    if experts is not None:
        keys.must_be("expert_feed_forward_length", values["intermediate_size"])
        return {**made, **experts, **_of_class("Mixtral"), "sliding_window": window}
    if window is not None:
        return {**made, **_of_class("Mistral"), "sliding_window": window}
    biases = (f"blk.0.ffn_{name}.bias" for name in ("gate", "up", "down"))
    return {**made, **_of_class("Llama"), "mlp_bias": any(bias in file.tensors for bias in biases)}


def _qwen(file: GgufFile, keys: Keys, values: Values) -> Values:
    """A Qwen2 or Qwen3, dense or a mixture. A window that is shorter than the context is refused: no key says in which
    layers it is."""
    made = _plain_heads(file, keys, values)
    if (window := _window(keys, values)) is not None:
        raise keys.wrong("attention.sliding_window", window, "as long as the context in this family")
    name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3moe": "Qwen3Moe"}[values["model_type"]]
    made |= {**_of_class(name), "model_type": values["model_type"]}
    if name != "Qwen3Moe":
        return made
    made |= {"num_experts": keys.count("expert_count", False), **(_experts(keys) or {})}
    made["moe_intermediate_size"] = keys.count("expert_feed_forward_length", False)
    return {**made, "norm_topk_prob": keys.flag("expert_weights_norm", True)}


def _gemma3(file: GgufFile, keys: Keys, values: Values) -> Values:
    """`context_length` is that of both ropes: the one of the layers with a window is never stretched. Ollama writes
    `rope.global.freq_base` and `rope.local.freq_base`."""
    layers, head_dim = values["num_hidden_layers"], values.get("head_dim") or 256
    per_head = values["hidden_size"] // values["num_attention_heads"]
    scalar = per_head if layers == _GEMMA3_27B_LAYERS else head_dim  # as llama.cpp tells it
    made = rope_values(file, keys, head_dim, values["max_position_embeddings"])
    _check_heads(keys, head_dim, scalar)
    if keys.get("rope.freq_base") is None:
        made["rope_theta"] = keys.positive("rope.global.freq_base", 1e6)
    made |= {
        **_of_class("Gemma3"),
        "model_type": "gemma3",
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar,
        "rope_local_base_freq": keys.positive("rope.freq_base_swa", keys.positive("rope.local.freq_base", 10_000.0)),
        **_layer_pattern(keys, layers),
    }
    if keys.get("final_logit_softcapping"):
        made["final_logit_softcapping"] = keys.positive("final_logit_softcapping", 0.0)
    window = keys.count_or_none("attention.sliding_window")
    return made if window is None else {**made, "sliding_window": window}


def _gpt_oss(file: GgufFile, keys: Keys, values: Values) -> Values:
    """Held as the family holds all its checkpoints: dequantized. Its yarn keeps the bounds of its ramp as they are,
    which no key says."""
    head_dim = values.get("head_dim") or 64
    made = rope_values(file, keys, head_dim, values["max_position_embeddings"])
    _check_heads(keys, head_dim, head_dim)
    keys.must_be("rope.freq_base_swa", made["rope_theta"])
    keys.must_be("expert_gating_func", 0, 3)  # 3: a softmax over the chosen ones
    made.setdefault("rope_scaling", {"rope_type": "default"})["truncate"] = False
    pattern = _layer_pattern(keys, values["num_hidden_layers"])
    if pattern.pop("sliding_window_pattern", 2) != 2:
        raise keys.wrong("attention.sliding_window_pattern", keys.get("attention.sliding_window_pattern"), "2")
    width = keys.count("expert_feed_forward_length", False)
    made |= {**_of_class("GptOss"), **(_experts(keys) or {}), "model_type": "gpt_oss", "intermediate_size": width}
    window = keys.count("attention.sliding_window", False)
    return {**made, **pattern, "head_dim": head_dim, "sliding_window": window, "dtype": "bfloat16"}


def _deepseek2(file: GgufFile, keys: Keys, values: Values) -> Values:
    """A DeepSeek-V3 where experts are scored by a sigmoid, else a V2. `key_length` is that of what is cached in newer
    files, and a head's in older ones; layers that predict further tokens are counted among the others."""
    key_dim = keys.count("attention.key_length_mla", True) or keys.count("attention.key_length", False) or 0
    rope_dim = keys.count("rope.dimension_count", False) or 0
    if key_dim <= rope_dim:
        raise keys.wrong("rope.dimension_count", rope_dim, f"less than the {key_dim} numbers of a key")
    further = keys.count_or_none("nextn_predict_layers") or 0
    value_dim = keys.count("attention.value_length_mla", True) or keys.count("attention.value_length", False)
    keys.must_be("attention.scale", 0.0, key_dim**-0.5)
    keys.ignore("attention.value_length")
    made: Values = {
        **_latent_rope(file, keys, rope_dim, values["max_position_embeddings"]),
        "num_hidden_layers": values["num_hidden_layers"] - further,
        "num_nextn_predict_layers": further,
        "num_key_value_heads": values["num_attention_heads"],
        "head_dim": rope_dim,
        "attention_bias": "blk.0.attn_kv_a_mqa.bias" in file.tensors,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_dim - rope_dim,
        "v_head_dim": value_dim,
        "kv_lora_rank": keys.count("attention.kv_lora_rank", False),
        "q_lora_rank": keys.count_or_none("attention.q_lora_rank"),
    }
    return made | _deepseek_experts(keys)


def _deepseek_experts(keys: Keys) -> Values:
    """Without a key for groups there are none, as in llama.cpp."""
    keys.must_be("expert_gating_func", 0, 1, 2)
    is_v3 = keys.get("expert_gating_func") == 2
    groups = keys.count_or_none("expert_group_count") or 1
    shared = keys.count_or_none("expert_shared_count") or 0
    return {
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "first_k_dense_replace": keys.count_or_none("leading_dense_block_count") or 0,
        "moe_intermediate_size": keys.count("expert_feed_forward_length", False),
        "n_routed_experts": keys.count("expert_count", False),
        "num_experts_per_tok": keys.count("expert_used_count", False),
        "n_shared_experts": shared,
        "n_group": groups,
        "topk_group": keys.count_or_none("expert_group_used_count") or groups,
        "topk_method": "noaux_tc" if is_v3 else "group_limited_greedy" if groups > 1 else "greedy",
        "routed_scaling_factor": keys.positive("expert_weights_scale", 1.0),
        "norm_topk_prob": keys.flag("expert_weights_norm", False),
    }


def _latent_rope(file: GgufFile, keys: Keys, rope_dim: int, context: int) -> Values:
    """The rope, and yarn's mscale over all dimensions, which the converter writes times 0.1; mscale itself is the same
    number, as llama.cpp has it for this kind."""
    made = rope_values(file, keys, rope_dim, context)
    scaling = made.get("rope_scaling") or {}
    if scaling.get("rope_type") == "yarn" and keys.get("rope.scaling.yarn_log_multiplier"):
        weight = keys.positive("rope.scaling.yarn_log_multiplier", 0.0) * 10
        scaling |= {"mscale": weight, "mscale_all_dim": weight}
    return made


def _plain_heads(file: GgufFile, keys: Keys, values: Values) -> Values:
    """The rope, of whole heads, and checks of the keys that other families have."""
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    made = rope_values(file, keys, head_dim, values["max_position_embeddings"])
    _check_heads(keys, head_dim, head_dim)
    keys.must_be("rope.freq_base_swa", made["rope_theta"])
    scaling = made.get("rope_scaling") or {}
    if (
        scaling.get("rope_type") == "linear"
    ):  # config.json states the length before stretching there, GGUF the one after
        made["max_position_embeddings"] = max(1, int(values["max_position_embeddings"] / scaling["factor"]))
    return made


def _check_heads(keys: Keys, head_dim: int, scalar: int) -> None:
    """Keys that may only say what is so already. scalar: by whose square root scores are divided."""
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        keys.must_be(key, head_dim)
    keys.must_be("attention.scale", 0.0, max(1, scalar) ** -0.5)


def _experts(keys: Keys) -> Values | None:
    num_experts = keys.count_or_none("expert_count")
    if num_experts is None:
        return None
    return {"num_experts_per_tok": keys.count("expert_used_count", False), "num_local_experts": num_experts}


def _window(keys: Keys, values: Values) -> int | None:
    """The sliding window of all layers; None without one, or when it is as long as the context."""
    window = keys.count_or_none("attention.sliding_window")
    return None if window is None or window >= values["max_position_embeddings"] else window


def _layer_pattern(keys: Keys, num_layers: int) -> Values:
    """Which layers have the window: all but every n-th, or those with a flag; empty where the file does not say."""
    pattern = keys.get("attention.sliding_window_pattern")
    if not isinstance(pattern, list):
        period = keys.count("attention.sliding_window_pattern", True)
        return {} if period is None else {"sliding_window_pattern": period}
    if len(pattern) < num_layers:
        raise keys.wrong("attention.sliding_window_pattern", pattern, f"a flag for each of {num_layers} layers")
    return {"layer_types": ["sliding_attention" if flag else "full_attention" for flag in pattern[:num_layers]]}


def _of_class(name: str) -> Values:
    return {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower()}


_KINDS: Mapping[str, Callable[[GgufFile, Keys, Values], Values]] = {
    "llama": _llama,  # Mistral and, with experts, Mixtral too
    "qwen2": _qwen,
    "qwen3": _qwen,
    "qwen3moe": _qwen,
    "gemma3": _gemma3,
    "deepseek2": _deepseek2,
    "bert": bert_values,
    "modern-bert": modern_bert_values,
    "gpt-oss": _gpt_oss,
}


def stored_encoding(tensors: Mapping[str, GgufTensor]) -> str:
    """The encoding that most bytes of the layers' matrices are in: of a Q4_K_M file, q4_k. "" without a matrix."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        if len(tensor.shape) > 1 and tensor.name.startswith("blk."):
            sizes[tensor.type.encoding] = sizes.get(tensor.type.encoding, 0) + math.prod(tensor.shape)
    return max(sizes, key=lambda name: sizes[name], default="")


def _vocab_size(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(f"{file.path} has no token_embd.weight of two dimensions, so it is no language model.")
    return embedding.shape[0]


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token_id, and eos_token_id as a list: the file's own, and control (or added) tokens known to end
    a turn."""
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    kinds, tokens = metadata.get("tokenizer.ggml.token_type"), metadata.get("tokenizer.ggml.tokens")
    by_name: list[int] = []
    if isinstance(kinds, list) and isinstance(tokens, list | StringArray):
        special = (i for i, kind in enumerate(kinds[: len(tokens)]) if kind in (3, 4))
        by_name = [i for i in special if tokens[i] in _END_NAMES]
    found = list(dict.fromkeys(end for end in [*ends, *by_name] if type(end) is int))
    result: dict[str, Any] = {"eos_token_id": found} if found else {}
    begin = metadata.get("tokenizer.ggml.bos_token_id")
    return result | ({"bos_token_id": begin} if type(begin) is int else {})

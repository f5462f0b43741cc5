"""GGUF keys as the values of a Hugging Face config.json, so that model families read one kind of configuration.

Names of keys: the ggml project's docs/gguf.md; `{arch}` is general.architecture, and keys below it begin with its name.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

from max_ray.errors import ArchitectureNotFoundError, WeightsError
from max_ray.gguf.file import GgufFile, GgufTensor

_CLASSES = {
    "llama": "LlamaForCausalLM",  # Mistral and, with experts, Mixtral too
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
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
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_CONTEXTS = (8192, 4096, 2048, 16384, 32768)
_END_NAMES = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>")


def huggingface_values(file: GgufFile) -> dict[str, Any]:
    """config.json's values for the model in `file`. Raises WeightsError for keys that are missing or cannot work,
    ArchitectureNotFoundError for a kind of model that no family here reads from GGUF."""
    arch = file.architecture
    if arch not in _CLASSES:
        known = ", ".join(sorted(_CLASSES))
        raise ArchitectureNotFoundError(f"{file.path} is of the kind {arch!r}; kinds that can be read: {known}.")
    keys = _Keys(file)
    values: dict[str, Any] = {"architectures": [_CLASSES[arch]], "model_type": arch}
    values |= {name: count for key, name in _COUNTS.items() if (count := keys.count(key, key in _OPTIONAL)) is not None}
    values["rms_norm_eps"] = keys.positive("attention.layer_norm_rms_epsilon", 1e-6)
    values["vocab_size"] = _vocab_size(file)
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    values["dtype"] = stored_encoding(file.tensors)
    return values | _rope(file, keys, values) | _of_the_kind(keys, values) | _special_ids(file.metadata)


def _of_the_kind(keys: _Keys, values: Mapping[str, Any]) -> dict[str, Any]:
    """What one kind of model has and others have not."""
    if values["model_type"] == "gemma3":
        theta, window = keys.positive("rope.freq_base", 1e6), keys.count("attention.sliding_window", True)
        head_dim = values.get("head_dim") or 256
        per_head = values["hidden_size"] // values["num_attention_heads"]
        scalar = per_head if values["num_hidden_layers"] == _GEMMA3_27B_LAYERS else head_dim  # as llama.cpp tells it
        gemma = {"rope_theta": theta, "head_dim": head_dim, "query_pre_attn_scalar": scalar}
        return gemma if window is None else {**gemma, "sliding_window": window}
    num_experts = keys.count("expert_count", True)
    if num_experts is None:
        return {}
    chosen = {"num_experts_per_tok": keys.count("expert_used_count", False), "num_local_experts": num_experts}
    if values["model_type"] == "llama":
        return {**chosen, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    width = keys.count("expert_feed_forward_length", False)
    return {**chosen, "num_experts": num_experts, "moe_intermediate_size": width, "norm_topk_prob": True}


def stored_encoding(tensors: Mapping[str, GgufTensor]) -> str:
    """The encoding that most bytes of the layers' matrices are in: of a Q4_K_M file, q4_k. "" without a matrix."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        if len(tensor.shape) > 1 and tensor.name.startswith("blk."):
            sizes[tensor.type.encoding] = sizes.get(tensor.type.encoding, 0) + math.prod(tensor.shape)
    return max(sizes, key=lambda name: sizes[name], default="")


class _Keys:
    """Typed access to the keys of the architecture."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file

    def get(self, key: str) -> Any:
        return self._file.metadata.get(f"{self._file.architecture}.{key}")

    def count(self, key: str, optional: bool) -> int | None:
        value = self.get(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # a number for each layer
        if value is None and optional:
            return None
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise self._wrong(key, value, "a positive integer, the same for all layers")
        return value

    def positive(self, key: str, default: float) -> float:
        value = self.get(key)
        if value is None:
            return default
        if type(value) not in (int, float) or not 0 < value < 1e18:
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def _wrong(self, key: str, value: object, rule: str) -> WeightsError:
        shown = repr(value)[:60]
        return WeightsError(f"{self._file.path}: key {self._file.architecture}.{key} must be {rule}, not {shown}.")


def _vocab_size(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(f"{file.path} has no token_embd.weight of two dimensions, so it is no language model.")
    return embedding.shape[0]


def _rope(file: GgufFile, keys: _Keys, values: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta, partial_rotary_factor and rope_scaling."""
    theta = keys.positive("rope.freq_base", 10000.0)
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    rotated = keys.count("rope.dimension_count", True) or head_dim
    result: dict[str, Any] = {"rope_theta": theta}
    if rotated != head_dim:
        result["partial_rotary_factor"] = rotated / head_dim
    kind = keys.get("rope.scaling.type")
    if _ROPE_FACTORS in file.tensors:
        result["rope_scaling"] = _llama3_scaling(file.tensors[_ROPE_FACTORS], theta, rotated)
    elif kind in ("linear", "yarn"):
        result["rope_scaling"] = {"rope_type": kind, "factor": keys.positive("rope.scaling.factor", 1.0)}
        original = keys.count("rope.scaling.original_context_length", True)
        if original is not None:
            result["rope_scaling"]["original_max_position_embeddings"] = original
        if kind == "linear":  # config.json states the length before stretching there, GGUF the one after it
            stretched = values["max_position_embeddings"]
            result["max_position_embeddings"] = max(1, int(stretched / result["rope_scaling"]["factor"]))
    elif kind not in (None, "none"):
        raise WeightsError(f"{file.path}: rope.scaling.type {kind!r} cannot be read; linear and yarn can.")
    return result


def _llama3_scaling(tensor: GgufTensor, theta: float, rotated: int) -> dict[str, Any]:
    """The scaling whose factors the file holds as a tensor: the parameters that give the same factors.

    Llama 3.1 divides inverse frequency i by 1 (short wavelengths), by `factor` (long ones), or by something between.
    The converter keeps the quotients alone, so the parameters are found by trying the published ones.
    """
    if tensor.type.name != "F32" or tensor.shape != (rotated // 2,):
        raise WeightsError(f"{tensor.path}: {tensor.name} must be {rotated // 2} F32 numbers.")
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        factors = struct.unpack(f"<{rotated // 2}f", file.read(tensor.nbytes))
    for original in _LLAMA3_CONTEXTS:
        wanted = [_llama3_factor(theta ** (2 * i / rotated), max(factors), original) for i in range(rotated // 2)]
        if all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(factors, wanted, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": float(max(factors)),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise WeightsError(f"{tensor.path}: the factors in {tensor.name} are not those of a Llama 3 rope scaling.")


def _llama3_factor(inverse_of_frequency: float, factor: float, original: int) -> float:
    """By what transformers' `_compute_llama3_parameters` divides a frequency, low_freq_factor 1, high_freq_factor 4."""
    turns = original / (2 * math.pi * inverse_of_frequency)
    if turns > 4.0:
        return 1.0
    smooth = max(0.0, (turns - 1.0) / 3.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token_id, and eos_token_id as a list: the file's own, and control (or added) tokens known to end
    a turn."""
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    kinds, tokens = metadata.get("tokenizer.ggml.token_type") or [], metadata.get("tokenizer.ggml.tokens") or []
    by_name = [
        i for i, (kind, token) in enumerate(zip(kinds, tokens, strict=False)) if kind in (3, 4) and token in _END_NAMES
    ]
    found = list(dict.fromkeys(end for end in [*ends, *by_name] if type(end) is int))
    result: dict[str, Any] = {"eos_token_id": found} if found else {}
    begin = metadata.get("tokenizer.ggml.bos_token_id")
    return result | ({"bos_token_id": begin} if type(begin) is int else {})

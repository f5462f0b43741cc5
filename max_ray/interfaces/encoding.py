"""Names of weight encodings, checkpoint formats, rope layouts and cache strategies (MAX's strings, and a few more)."""

from __future__ import annotations

from enum import Enum


class SupportedEncoding(str, Enum):
    """How the weights of a model are stored and executed."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    q4_k = "q4_k"
    q4_0 = "q4_0"
    q4_1 = "q4_1"
    q5_k = "q5_k"
    q6_k = "q6_k"
    q8_0 = "q8_0"
    float8_e4m3fn = "float8_e4m3fn"
    gptq = "gptq"
    awq = "awq"

    @property
    def is_quantized(self) -> bool:
        """Whether weights are codes and scales, and not plain numbers."""
        return self.value not in ("float32", "bfloat16", "float16")

    @property
    def cache_dtype(self) -> str:
        """dtype of keys and values, and of the activations, under this encoding."""
        return self.value if self.value in ("float32", "float16") else "bfloat16"


class WeightsFormat(str, Enum):
    safetensors = "safetensors"
    gguf = "gguf"


class RopeType(str, Enum):
    """Order of the rotated pairs: `normal` interleaves them (GGUF), `neox` splits the head in halves (Hugging Face)."""

    none = "none"
    normal = "normal"
    neox = "neox"
    longrope = "longrope"
    yarn = "yarn"


class KVCacheStrategy(str, Enum):
    MODEL_DEFAULT = "model_default"
    PAGED = "paged"


EVERY_ENCODING = {encoding: [KVCacheStrategy.PAGED] for encoding in SupportedEncoding}
"""For the record of a family whose matrices are all in the layers of `max_ray.nn`, which hold each of them."""

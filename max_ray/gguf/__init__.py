"""GGUF files without torch: header, model configuration, tokenizer. The tensors themselves are read by `weights`."""

from max_ray.gguf.config import huggingface_values
from max_ray.gguf.file import GgufFile, GgufTensor, first_parts, gguf_parts, lone_gguf, part_names, read_gguf
from max_ray.gguf.names import own_name
from max_ray.gguf.types import TensorType

__all__ = [
    "GgufFile",
    "GgufTensor",
    "TensorType",
    "first_parts",
    "gguf_parts",
    "huggingface_values",
    "lone_gguf",
    "own_name",
    "part_names",
    "read_gguf",
]

"""The tensor types of GGUF: elements and bytes of a block of each (ggml's `ggml_type` and `type_traits`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorType:
    """block_size: elements a block, along a row. block_bytes: bytes a block. encoding: the SupportedEncoding that it is
    kept in; types that have none of their own are kept in a larger one (`weights.gguf_other_blocks`)."""

    name: str
    block_size: int
    block_bytes: int
    encoding: str = ""

    @property
    def is_quantized(self) -> bool:
        return self.block_size > 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` elements, a multiple of the block size."""
        return columns // self.block_size * self.block_bytes


READABLE: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4, "float32"),
    1: TensorType("F16", 1, 2, "float16"),
    2: TensorType("Q4_0", 32, 18, "q4_0"),
    3: TensorType("Q4_1", 32, 20, "q4_1"),
    6: TensorType("Q5_0", 32, 22, "q8_0"),
    7: TensorType("Q5_1", 32, 24, "q8_0"),
    8: TensorType("Q8_0", 32, 34, "q8_0"),
    10: TensorType("Q2_K", 256, 84, "q8_0"),
    11: TensorType("Q3_K", 256, 110, "q6_k"),
    12: TensorType("Q4_K", 256, 144, "q4_k"),
    13: TensorType("Q5_K", 256, 176, "q5_k"),
    14: TensorType("Q6_K", 256, 210, "q6_k"),
    20: TensorType("IQ4_NL", 32, 18, "q8_0"),
    23: TensorType("IQ4_XS", 256, 136, "q8_0"),
    30: TensorType("BF16", 1, 2, "bfloat16"),
    39: TensorType("MXFP4", 32, 17, "q8_0"),
}
"""By the number that stands in the file."""

UNREADABLE: dict[int, str] = {
    **{9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0"},
    40: "NVFP4",
}
"""Types that the format has and this reader has not, by number."""

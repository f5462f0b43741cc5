"""The tensor types of GGUF: elements and bytes of a block of each (ggml's `ggml_type` and `type_traits`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorType:
    """block_size: elements a block, along a row. block_bytes: bytes a block. encoding: its SupportedEncoding, or ""."""

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
    8: TensorType("Q8_0", 32, 34, "q8_0"),
    12: TensorType("Q4_K", 256, 144, "q4_k"),
    14: TensorType("Q6_K", 256, 210, "q6_k"),
    30: TensorType("BF16", 1, 2, "bfloat16"),
}
"""By the number that stands in the file."""

UNREADABLE: dict[int, str] = {
    **{3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K"},
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S"},
    **{23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0"},
    39: "MXFP4",
}
"""Types that the format has and this reader has not, by number."""

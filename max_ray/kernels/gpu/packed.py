# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Reading tiles of a PackedMatrix in a kernel (`kernels/quantized.py` has the layout): codes as numbers, and scales.

Axes: G groups of 32 columns, N rows of the matrix.

A 32-bit word holds the codes of 4 neighbouring columns of a row, for nibbles twice: 16 * half + 4i + 2c + h of a group,
where 2c + h is the byte of word i. In the left operand of a tensor core a thread holds the columns 2i, 2i + 1, 8 + 2i
and 9 + 2i of 16. A product does not care about the order of its columns, so with the order [half, h, i, c] these are
the four codes of one word, and a thread unpacks its words in its own registers.

Codes become numbers without a conversion: over the bits of 128 in bfloat16, or 1024 in float16, a code is that more.
Bytes 2c + h for both c are one mask away from the two halves of a register.
"""

from __future__ import annotations

import triton
import triton.language as tl

Q4K, Q5K, Q6K, Q8, Q4, FP8, Q4_1 = (tl.constexpr(number) for number in range(7))  # KIND: which PackedMatrix it is


@triton.jit
def load_codes(codes, high_codes, rows, group, num_groups, num_columns, mask, KIND: tl.constexpr):
    """32-bit words of four codes each (a byte a code), int32 [G, N, 2, 4] (half, i).

    codes, high_codes: pointers of 32-bit words to the first tile. rows [N] from there; group [G], mask [G]."""
    tile, lane = (rows // 16)[None, :, None], (rows % 16)[None, :, None]
    within, exists = group[:, None, None], mask[:, None, None]
    if KIND == Q8 or KIND == FP8:  # noqa: SIM109 (Triton has no `in`)
        which = tl.arange(0, 8)[None, None, :]
        if KIND == Q8:
            place = tile * (num_groups * 128) + within * 128 + which * 16 + lane
        else:
            place = rows[None, :, None] * (num_columns // 4) + within * 8 + which
            exists = exists & (within * 8 + which < num_columns // 4)
        words = tl.load(codes + place, mask=exists, other=0)
        result = tl.reshape(words, (words.shape[0], words.shape[1], 2, 4))
    else:
        which = tl.arange(0, 4)[None, None, :]
        words = tl.load(codes + tile * (num_groups * 64) + within * 64 + which * 16 + lane, mask=exists, other=0)
        low, high = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F
        if KIND == Q6K:
            place = tile * (num_groups * 32) + within * 32 + which // 2 * 16 + lane
            pairs = tl.load(high_codes + place, mask=exists, other=0) >> (which % 2 * 4)
            low, high = low | ((pairs & 0x03030303) << 4), high | ((pairs & 0x0C0C0C0C) << 2)
        elif KIND == Q5K:  # bit i of a byte: of line i
            place = tile * (num_groups * 16) + within * 16 + which * 0 + lane
            bits = tl.load(high_codes + place, mask=exists, other=0) >> which
            low, high = low | ((bits & 0x01010101) << 4), high | (bits & 0x10101010)
        result = tl.permute(tl.join(low, high), (0, 1, 3, 2))
    return result


@triton.jit
def codes_as_numbers(words, KIND: tl.constexpr, dtype: tl.constexpr):
    """words [G, N, 2, 4] -> exact codes, of Q6K less 32, in the columns' order: [G, N, 2, 4, 2, 2] (half, i, c, h)."""
    if dtype == tl.float32 or KIND == Q8:
        even = tl.join(_number(words, KIND, dtype), _number(words >> 16, KIND, dtype))
        odd = tl.join(_number(words >> 8, KIND, dtype), _number(words >> 24, KIND, dtype))
    else:
        even, odd = _two_numbers(words, KIND, dtype), _two_numbers(words >> 8, KIND, dtype)
    codes = tl.join(even, odd)
    if KIND != Q8 and KIND != FP8:
        BIAS: tl.constexpr = 0.0 if dtype == tl.float32 else (128.0 if dtype == tl.bfloat16 else 1024.0)
        CENTER: tl.constexpr = 32.0 if KIND == Q6K else 0.0
        codes -= BIAS + CENTER
    return codes


@triton.jit
def _two_numbers(words, KIND: tl.constexpr, dtype: tl.constexpr):
    """Bytes 0 and 2 of each word as numbers of a 16-bit type, codes of bits plus 128 or 1024: [..., 2]."""
    if KIND == FP8:
        # The exponent of an e4m3 number has the bias 7 and fewer bits; 0x7F is no number.
        IS_BFLOAT16: tl.constexpr = dtype == tl.bfloat16
        magnitude = words & 0x007F007F
        is_nan = ((magnitude + 0x00010001) & 0x00800080) * (0xFF if IS_BFLOAT16 else 0xF8)
        bits = ((words << 8) & -0x7FFF8000) | (magnitude << (4 if IS_BFLOAT16 else 7)) | is_nan
        numbers = _halves(bits, dtype) * (2.0**120 if IS_BFLOAT16 else 256.0)
    else:
        numbers = _halves((words & 0x00FF00FF) | (0x43004300 if dtype == tl.bfloat16 else 0x64006400), dtype)
    return numbers


@triton.jit
def _halves(words, dtype: tl.constexpr):
    """The bits of two numbers of a 16-bit type -> the numbers, [..., 2]."""
    low, high = words.to(tl.int16).to(dtype, bitcast=True), (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _number(words, KIND: tl.constexpr, dtype: tl.constexpr):
    """Byte 0 of each word as a number; dtype holds all of them."""
    if KIND == Q8:
        bits = (words & 0xFF) ^ 0x4B000080  # of 2^23 + 128 + code
        number = bits.to(tl.float32, bitcast=True) - 8388736.0
    elif KIND == FP8:
        magnitude = words & 0x7F
        bits = ((words & 0x80) << 24) | (magnitude << 20)
        number = tl.where(magnitude == 0x7F, float("nan"), bits.to(tl.float32, bitcast=True) * 2.0**120)
    else:
        number = (words & 0xFF).to(tl.float32)
    return number.to(dtype)


@triton.jit
def load_scales(
    tensors, rows, group, num_groups, num_scales, mask, KIND: tl.constexpr, SIZE: tl.constexpr,
    SINGLE_ZERO: tl.constexpr,
):  # fmt: skip
    """(scale, scale of the second halves, offset), float32 [G, N]: an element is scale * code - offset.

    tensors: see `scales_from_tile`. SIZE: columns that share a scale. Only with 16 odd times of them the halves of a
    group differ; no kind has that and offsets, but for Q6K, whose offsets are in `codes_as_numbers`."""
    scales, mins, super_scales, super_mins = tensors
    tile, lane, exists = (rows // 16)[None, :], (rows % 16)[None, :], mask[:, None]
    above = tile * (num_groups // 8 * 16) + (group // 8 * 16)[:, None] + lane
    place = tile * (num_scales * 16) + (group * 32 // SIZE * 16)[:, None] + lane
    scale = tl.load(scales + place, mask=exists, other=0.0).to(tl.float32)
    factor = tl.full(scale.shape, 1.0, dtype=tl.float32)
    if KIND == Q4K or KIND == Q5K or KIND == Q6K:  # noqa: SIM109
        factor = tl.load(super_scales + above, mask=exists, other=0.0).to(tl.float32)
    scale *= factor
    second, offset = scale, tl.zeros_like(scale)
    if SIZE % 32 == 16:
        if KIND == FP8:  # the others have whole groups
            exists = exists & (group * 32 + 16 < num_scales * SIZE)[:, None]
        if SIZE == 16:
            place += 16
        else:
            place = tile * (num_scales * 16) + ((group * 32 + 16) // SIZE * 16)[:, None] + lane
        second = factor * tl.load(scales + place, mask=exists, other=0.0).to(tl.float32)
    elif KIND == Q4K or KIND == Q5K:  # noqa: SIM109
        least = tl.load(super_mins + above, mask=exists, other=0.0).to(tl.float32)
        offset = least * tl.load(mins + place, mask=exists, other=0).to(tl.float32)
    elif KIND == Q4:
        zero = tl.load(mins + (place * 0 if SINGLE_ZERO else place), mask=exists, other=0)
        offset = scale * zero.to(tl.float32)
    elif KIND == Q4_1:
        offset = -tl.load(mins + place, mask=exists, other=0.0).to(tl.float32)
    return scale, second, offset


@triton.jit
def codes_from_tile(codes, high_codes, tile, num_groups, num_columns, KIND: tl.constexpr):
    """(codes, high_codes) from this tile on; tile: int64."""
    if KIND == FP8:
        return codes + tile * num_columns * 4, high_codes
    high_codes += tile * num_groups * (16 if KIND == Q5K else 32)
    return codes + tile * num_groups * (128 if KIND == Q8 else 64), high_codes


@triton.jit
def scales_from_tile(tensors, tile, num_groups, num_scales, SINGLE_ZERO: tl.constexpr):
    """tensors, (scales, mins, super_scales, super_mins), from this tile on; tile: int64. mins of "q4": its zeros, and
    with SINGLE_ZERO one for all."""
    scales, mins, super_scales, super_mins = tensors
    above = tile * (num_groups // 8) * 16
    place = tile * num_scales * 16
    return scales + place, mins if SINGLE_ZERO else mins + place, super_scales + above, super_mins + above

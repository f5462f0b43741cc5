// The processor's products of bf16, where it has them (AVX-512 BF16), and how pairs are read.
//
// vdpbf16ps adds the products of 16 pairs of bf16 to 16 sums of float32. It rounds each addition to nearest even and takes
// subnormal numbers for zeros, whatever the processor's modes are.
#pragma once
#include "vec.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

static inline f32x16 dot2(f32x16 sums, u32x16 a, u32x16 b) {
    return (f32x16)_mm512_dpbf16_ps((__m512)sums, (__m512bh)b, (__m512bh)a);
}
#endif

// 16 pairs as the bits of floats; of the last `left` numbers, a multiple of 16, where there are fewer than 32.
static inline f32x16 load_pairs(const bf16 *p, int64_t left) {
    if (left >= 2 * LANES) return load16((const float *)p);
    return load_part((const float *)p, left / 2);
}

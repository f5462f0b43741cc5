// Reading the tiles of max_ray/kernels/quantized.py: codes and scales of 16 rows at a time.
#pragma once
#include "kernels.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr int GROUP_COLUMNS = 32;
constexpr int NIBBLE_BYTES = 256, PAIR_BYTES = 128, BIT_BYTES = 64, WHOLE_BYTES = 512;  // of a group in a tile: codes of 4, 2, 1, 8 bits

typedef int16_t i16x16 __attribute__((vector_size(32)));

static inline f32x16 number(i32x16 code) { return __builtin_convertvector(code, f32x16); }
// In two steps where there is no instruction for it: the compiler takes a byte at a time through registers otherwise.
static inline f32x16 load_bytes(const uint8_t *p) {
#ifdef __AVX512F__
    return number((i32x16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
#else
    typedef uint8_t u8x16u __attribute__((vector_size(16), aligned(1)));
    return number(__builtin_convertvector(__builtin_convertvector(*(const u8x16u *)p, u16x16), i32x16));
#endif
}
static inline f32x16 load_signed_bytes(const int8_t *p) {
#ifdef __AVX512F__
    return number((i32x16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#else
    typedef int8_t i8x16u __attribute__((vector_size(16), aligned(1)));
    return number(__builtin_convertvector(__builtin_convertvector(*(const i8x16u *)p, i16x16), i32x16));
#endif
}
static inline void store_signed_bytes(int8_t *p, i32x16 x) {
#ifdef __AVX512F__
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)x));
#else
    typedef int8_t i8x16u __attribute__((vector_size(16), aligned(1)));
    *(i8x16u *)p = __builtin_convertvector(__builtin_convertvector(x, i16x16), i8x16u);
#endif
}
static inline u32x16 words(const uint8_t *p) { return *(const u32x16u *)p; }

// Vectors of 16 floats, in GCC's vector extension: the compiler makes AVX-512, two AVX2 halves or four NEON quarters of
// them. A vector times a scalar broadcasts the scalar; a * b + c becomes one fused multiply-add.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x16u __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16u __attribute__((vector_size(64), aligned(4)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x16u __attribute__((vector_size(32), aligned(2)));

constexpr int LANES = 16;

// One register of floats. GCC keeps wider vectors in memory: loops that hold sums in registers are written with this.
#if defined(__AVX512F__)
constexpr int REGISTER_LANES = 16;
#elif defined(__AVX__)
constexpr int REGISTER_LANES = 8;
#else
constexpr int REGISTER_LANES = 4;
#endif
constexpr int SPLIT = LANES / REGISTER_LANES;  // registers of 16 floats
typedef float register_floats __attribute__((vector_size(REGISTER_LANES * 4), may_alias));
typedef float register_floats_u __attribute__((vector_size(REGISTER_LANES * 4), aligned(4), may_alias));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

static inline f32x16 splat(float x) { return x - f32x16{}; }

static inline i32x16 splat_int(int32_t x) { return x - i32x16{}; }

static inline u32x16 splat_word(uint32_t x) { return x - u32x16{}; }

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    uint32_t u = uint32_t(x.bits) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline float to_float(f16 x) {
#ifdef __F16C__
    return _cvtsh_ss(x.bits);
#else
    _Float16 h;
    memcpy(&h, &x, 2);
    return float(h);
#endif
}
// To the nearest, ties to even.
static inline f16 to_half(float x) {
#ifdef __F16C__
    return {_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
#else
    const _Float16 h = _Float16(x);
    f16 result;
    memcpy(&result, &h, 2);
    return result;
#endif
}

// Round to nearest, ties to even; NaN stays NaN.
static inline u32x16 bf16_bits(f32x16 x) {
    u32x16 u = (u32x16)x;
    u32x16 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    u32x16 nan = (u32x16)(x != x);
    return (rounded & ~nan) | (nan & 0x7fc0u);
}

// 16 halves as words. (GCC's own conversion goes by 8 words on some processors.)
static inline u32x16 load_words(const bf16 *p) {
#ifdef __AVX512F__
    return (u32x16)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#else
    return __builtin_convertvector(*(const u16x16u *)p, u32x16);
#endif
}

// 16 numbers of IEEE's half precision; to the nearest, ties to even.
static inline f32x16 load_halves(const uint16_t *p) {
#ifdef __AVX512F__
    return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
    f32x16 v;
    for (int i = 0; i < LANES; i++) v[i] = to_float(f16{p[i]});
    return v;
#endif
}
static inline void store_halves(uint16_t *p, f32x16 x) {
#ifdef __AVX512F__
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < LANES; i++) {
        const _Float16 h = _Float16(x[i]);
        memcpy(p + i, &h, 2);
    }
#endif
}

static inline f32x16 load16(const float *p) { return *(const f32x16u *)p; }
static inline f32x16 load16(const bf16 *p) { return (f32x16)(load_words(p) << 16); }
static inline f32x16 load16(const f16 *p) { return load_halves(&p->bits); }
static inline void store16(float *p, f32x16 x) { *(f32x16u *)p = x; }
static inline void store16(bf16 *p, f32x16 x) {
#ifdef __AVX512F__
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)bf16_bits(x)));
#else
    *(u16x16u *)p = __builtin_convertvector(bf16_bits(x), u16x16);
#endif
}

static inline void store16(f16 *p, f32x16 x) { store_halves(&p->bits, x); }

// The first n < 16 elements; the others are 0 and stay unwritten.
template <class T> static inline f32x16 load_part(const T *p, int64_t n) {
    T padded[LANES] = {};
    memcpy(padded, p, n * sizeof(T));
    return load16(padded);
}
template <class T> static inline void store_part(T *p, f32x16 x, int64_t n) {
    T padded[LANES];
    store16(padded, x);
    memcpy(p, padded, n * sizeof(T));
}

// x as memory of type T would hold it.
template <class T> static inline f32x16 rounded(f32x16 x);
template <> inline f32x16 rounded<float>(f32x16 x) { return x; }
template <> inline f32x16 rounded<bf16>(f32x16 x) { return (f32x16)(bf16_bits(x) << 16); }
template <> inline f32x16 rounded<f16>(f32x16 x) {
    f16 halves[LANES];
    store16(halves, x);
    return load16(halves);
}

static inline float sum(f32x16 x) {
    float s[LANES];
    memcpy(s, &x, sizeof(s));
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}

static inline f32x16 vmax(f32x16 a, f32x16 b) { return a > b ? a : b; }

static inline float largest(f32x16 x) {
    float s[LANES];
    memcpy(s, &x, sizeof(s));
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] = s[i] > s[i + half] ? s[i] : s[i + half];
    return s[0];
}

// e^x for x <= 88, relative error below 2e-7: 2^n * e^r with |r| <= ln(2)/2, e^r by its Taylor polynomial of degree 7
// (remainder 2e-8). Below -87 the result is 0, also for -inf.
static inline f32x16 vexp(f32x16 x) {
    f32x16 clamped = vmax(x, splat(-87.0f));
    f32x16 shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer n ends up in the low bits
    f32x16 n = shifted - 12582912.0f;
    f32x16 r = clamped - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    f32x16 p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    f32x16 scaled = (f32x16)((i32x16)p + ((i32x16)shifted << 23));
    return (f32x16)((i32x16)scaled & (i32x16)(x >= splat(-87.0f)));
}

// 16 rows of 16 words, turned: `in` becomes the columns of `to`. Patterns that are one unpacking instruction each.
static inline void transpose16(const f32x16 in[16], float *to, int64_t to_stride) {
    f32x16 a[16], b[16];
    const i32x16 low_words = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
    const i32x16 high_words = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
    const i32x16 low_pairs = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    const i32x16 high_pairs = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
    const i32x16 even_quarters = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    const i32x16 odd_quarters = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = __builtin_shuffle(in[i], in[i + 1], low_words);
        a[i + 1] = __builtin_shuffle(in[i], in[i + 1], high_words);
    }
    // b[4q + c]: column 4l + c of rows 4q .. 4q + 3 in quarter l
#pragma GCC unroll 4
    for (int q = 0; q < 16; q += 4) {
        b[q] = __builtin_shuffle(a[q], a[q + 2], low_pairs);
        b[q + 1] = __builtin_shuffle(a[q], a[q + 2], high_pairs);
        b[q + 2] = __builtin_shuffle(a[q + 1], a[q + 3], low_pairs);
        b[q + 3] = __builtin_shuffle(a[q + 1], a[q + 3], high_pairs);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        const f32x16 even_top = __builtin_shuffle(b[c], b[4 + c], even_quarters);  // columns c and 8 + c, rows 0 .. 7
        const f32x16 odd_top = __builtin_shuffle(b[c], b[4 + c], odd_quarters);  // columns 4 + c and 12 + c
        const f32x16 even_bottom = __builtin_shuffle(b[8 + c], b[12 + c], even_quarters);
        const f32x16 odd_bottom = __builtin_shuffle(b[8 + c], b[12 + c], odd_quarters);
        store16(to + c * to_stride, __builtin_shuffle(even_top, even_bottom, even_quarters));
        store16(to + (8 + c) * to_stride, __builtin_shuffle(even_top, even_bottom, odd_quarters));
        store16(to + (4 + c) * to_stride, __builtin_shuffle(odd_top, odd_bottom, even_quarters));
        store16(to + (12 + c) * to_stride, __builtin_shuffle(odd_top, odd_bottom, odd_quarters));
    }
}

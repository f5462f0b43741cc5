// Vectors of 16 floats, in GCC's vector extension: the compiler makes AVX-512, two AVX2 halves or four NEON quarters of
// them. A vector times a scalar broadcasts the scalar; a * b + c becomes one fused multiply-add.
#pragma once
#include <cstdint>
#include <cstring>

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x16u __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16u __attribute__((vector_size(64), aligned(4)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x16u __attribute__((vector_size(32), aligned(2)));

constexpr int LANES = 16;

struct bf16 {
    uint16_t bits;
};

static inline f32x16 splat(float x) { return x - f32x16{}; }

static inline i32x16 splat_int(int32_t x) { return x - i32x16{}; }

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    uint32_t u = uint32_t(x.bits) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

// Round to nearest, ties to even; NaN stays NaN.
static inline u32x16 bf16_bits(f32x16 x) {
    u32x16 u = (u32x16)x;
    u32x16 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    u32x16 nan = (u32x16)(x != x);
    return (rounded & ~nan) | (nan & 0x7fc0u);
}

static inline f32x16 load16(const float *p) { return *(const f32x16u *)p; }
static inline f32x16 load16(const bf16 *p) {
    return (f32x16)(__builtin_convertvector(*(const u16x16u *)p, u32x16) << 16);
}
static inline void store16(float *p, f32x16 x) { *(f32x16u *)p = x; }
static inline void store16(bf16 *p, f32x16 x) { *(u16x16u *)p = __builtin_convertvector(bf16_bits(x), u16x16); }

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

// 16 rows of 16 words, turned: `in` becomes the columns of `to`.
static inline void transpose16(const f32x16 in[16], float *to, int64_t to_stride) {
    f32x16 a[16], b[16];
    const i32x16 lo1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
    const i32x16 hi1 = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
    const i32x16 lo2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    const i32x16 hi2 = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
    const i32x16 lo4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
    const i32x16 hi4 = {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31};
    const i32x16 lo8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const i32x16 hi8 = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
    for (int i = 0; i < 16; i += 2)
        a[i] = __builtin_shuffle(in[i], in[i + 1], lo1), a[i + 1] = __builtin_shuffle(in[i], in[i + 1], hi1);
    for (int i = 0; i < 16; i++)
        if (!(i & 2)) b[i] = __builtin_shuffle(a[i], a[i + 2], lo2), b[i + 2] = __builtin_shuffle(a[i], a[i + 2], hi2);
    for (int i = 0; i < 16; i++)
        if (!(i & 4)) a[i] = __builtin_shuffle(b[i], b[i + 4], lo4), a[i + 4] = __builtin_shuffle(b[i], b[i + 4], hi4);
    for (int i = 0; i < 16; i++)
        if (!(i & 8)) b[i] = __builtin_shuffle(a[i], a[i + 8], lo8), b[i + 8] = __builtin_shuffle(a[i], a[i + 8], hi8);
    for (int i = 0; i < 16; i++) store16(to + i * to_stride, b[i]);
}

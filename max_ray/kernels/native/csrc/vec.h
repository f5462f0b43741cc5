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

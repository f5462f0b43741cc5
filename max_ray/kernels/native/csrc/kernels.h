// What the library exports: each kernel as NAME_f32, NAME_bf16 and NAME_f16, and NAME_f32_again, which takes its arguments from an
// array of 64-bit words (see replay.cpp). Shapes and meaning of the arguments: ops.py and packed.py.
#pragma once
#include "vec.h"

struct RopeShape {
    int64_t T, H, KVH, D, R;
    int64_t q_stride, k_stride, v_stride;  // elements from one token to the next
    int interleaved;
};

struct AttentionShape {
    int64_t B, H, KVH, D, page_size, table_width;
    int64_t window;  // 0: none
    float scale, softcap;  // softcap 0: none
};

// Widths: P of a head's part without position, R of its rotated part, L of a latent, V of a value.
struct LatentShape {
    int64_t B, H, P, R, L, V, page_size, table_width;
    float scale;
};

// A matrix of max_ray/kernels/quantized.py. mins: also the zeros of plain 4-bit groups; super_scales: also the only scales of
// 8-bit and plain 4-bit groups.
struct QuantizedMatrix {
    const uint8_t *codes, *high_codes, *scales, *mins;
    const uint16_t *super_scales, *super_mins;
    int64_t group_size, single_zero;
};

#define MAX_RAY_DECLARE_QUANTIZED(KIND, NAME, T)                                                                          \
    void KIND##_linear_##NAME(const QuantizedMatrix *w, const T *x, int64_t M, int64_t K, int64_t N, T *y,                \
                              int64_t y_stride, int threads);                                                             \
    void KIND##_int8_##NAME(const QuantizedMatrix *w, const T *x, int64_t M, int64_t K, int64_t N, T *y,                  \
                            int64_t y_stride, int threads);

#define MAX_RAY_DECLARE(NAME, T)                                                                                          \
    void linear_##NAME(const T *x, int64_t x_stride, int64_t M, int64_t K, const void *packed, int64_t N, const T *bias,  \
                       T *y, int threads);                                                                                \
    void pack_##NAME(const T *w, int64_t N, int64_t K, void *to, int threads);                                            \
    void rows_##NAME(const void *packed, int64_t K, const int64_t *rows, int64_t count, T *y, int threads);               \
    void rmsnorm_##NAME(const T *x, const T *weight, T *y, int64_t rows, int64_t D, float eps, int threads);              \
    void add_rmsnorm_##NAME(const T *x, const T *residual, const T *weight, T *y, T *total, int64_t rows, int64_t D,      \
                            float eps, int threads);                                                                      \
    void silu_and_mul_##NAME(const T *x, T *y, int64_t rows, int64_t F, int threads);                                     \
    void gather_rows_##NAME(const T *x, int64_t stride, const int64_t *rows, int64_t count, int64_t D, T *y);             \
    void sum_rows_##NAME(const T *x, int64_t rows, int64_t width, T *y);                                                  \
    void argmax_##NAME(const T *x, int64_t stride, int64_t rows, int64_t V, int64_t *y, int threads);                     \
    void rope_and_append_##NAME(const T *q, const T *k, const T *v, T *q_out, T *k_cache, T *v_cache, const T *cos_sin,   \
                                const int64_t *positions, const int64_t *slots, const RopeShape *shape, int threads);     \
    void paged_attention_##NAME(const T *q, const T *k_cache, const T *v_cache, const int32_t *tables,                    \
                                const int32_t *lengths, const int32_t *indptr, const float *sinks, T *y,                  \
                                const AttentionShape *shape, int threads);                                                \
    void latent_attention_##NAME(const T *q, const T *up, const T *cache, const int32_t *tables, const int32_t *lengths,  \
                                 const int32_t *indptr, T *y, const LatentShape *shape, int threads);

extern "C" {
MAX_RAY_DECLARE(f32, float)
MAX_RAY_DECLARE(bf16, bf16)
MAX_RAY_DECLARE(f16, f16)
MAX_RAY_DECLARE_QUANTIZED(q4k, f32, float)
MAX_RAY_DECLARE_QUANTIZED(q4k, bf16, bf16)
MAX_RAY_DECLARE_QUANTIZED(q4k, f16, f16)
MAX_RAY_DECLARE_QUANTIZED(q5k, f32, float)
MAX_RAY_DECLARE_QUANTIZED(q5k, bf16, bf16)
MAX_RAY_DECLARE_QUANTIZED(q5k, f16, f16)
MAX_RAY_DECLARE_QUANTIZED(q6k, f32, float)
MAX_RAY_DECLARE_QUANTIZED(q6k, bf16, bf16)
MAX_RAY_DECLARE_QUANTIZED(q6k, f16, f16)
MAX_RAY_DECLARE_QUANTIZED(q8, f32, float)
MAX_RAY_DECLARE_QUANTIZED(q8, bf16, bf16)
MAX_RAY_DECLARE_QUANTIZED(q8, f16, f16)
MAX_RAY_DECLARE_QUANTIZED(q4, f32, float)
MAX_RAY_DECLARE_QUANTIZED(q4, bf16, bf16)
MAX_RAY_DECLARE_QUANTIZED(q4, f16, f16)
MAX_RAY_DECLARE_QUANTIZED(q41, f32, float)
MAX_RAY_DECLARE_QUANTIZED(q41, bf16, bf16)
MAX_RAY_DECLARE_QUANTIZED(q41, f16, f16)
void linear_dot_bf16(const bf16 *x, int64_t x_stride, int64_t M, int64_t K, const void *packed, int64_t N, const bf16 *bias,
                     bf16 *y, int threads);
void linear_tiles_bf16(const bf16 *x, int64_t x_stride, int64_t M, int64_t K, const void *packed, int64_t N,
                       const bf16 *bias, bf16 *y, int threads);
void decode_slots_i64(const int32_t *tables, int64_t width, const int32_t *lengths, int64_t rows, int64_t page_size, int64_t *y);
void positions_i64(const int32_t *lengths, int64_t rows, int64_t *y);
}

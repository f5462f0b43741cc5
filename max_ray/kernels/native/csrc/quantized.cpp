// y = x W^T with a quantized W, from the tiles that max_ray/kernels/quantized.py describes.
//
// For a tile of 16 outputs, CHUNK inputs at a time, the codes become floats (code * scale - offset, exact up to one rounding)
// in a small buffer in the first cache; then all rows use them. So memory is read at the codes' size, once, and an output is
// the same chain of multiply-adds in the order of K, whatever the number of rows.
#include "scratch.h"
#include "tiles.h"
#include <atomic>
#include <utility>

namespace {

constexpr int CHUNK = 256;  // inputs: a super-group, and 16 KiB of widened weights
constexpr int ROW = CHUNK + ROW_PAD;
constexpr int BLOCK = SPLIT == 1 ? 28 : 6;  // rows at once: 28 accumulators with AVX-512, 12 with AVX2
constexpr int GROUP = GROUP_COLUMNS;

// A group of 32 columns of 4-bit codes: 4 lines of 16 words of 4 bytes, low nibbles k = 4i + b, high nibbles 16 more.
template <class F> static inline void each_nibble(const uint8_t *codes, F give) {
    for (int i = 0; i < 4; i++) {
        const u32x16 line = words(codes + i * 64);
        for (int b = 0; b < 4; b++) {
            give(4 * i + b, (line >> (8 * b)) & 15u);
            give(16 + 4 * i + b, (line >> (8 * b + 4)) & 15u);
        }
    }
}

// Each kind: `widen` turns group g of tile t into floats [32][16].
struct Q4K {
    const uint8_t *codes, *scales, *mins;
    const uint16_t *super_scales, *super_mins;
    f32x16 scale(int64_t at) const { return load_bytes(scales + at * LANES) * load_halves(super_scales + at / 8 * LANES); }
    f32x16 offset(int64_t at) const { return load_bytes(mins + at * LANES) * load_halves(super_mins + at / 8 * LANES); }
    void widen(int64_t t, int64_t g, int64_t groups, float *to) const {
        const int64_t at = t * groups + g;
        const f32x16 scale = this->scale(at), offset = this->offset(at);
        each_nibble(codes + at * 256, [&](int k, u32x16 code) { store16(to + k * LANES, number((i32x16)code) * scale - offset); });
    }
};

// Bit i of byte b of a row's high word: k = 4i + b.
struct Q5K {
    Q4K low;
    const uint8_t *high;
    void widen(int64_t t, int64_t g, int64_t groups, float *to) const {
        const int64_t at = t * groups + g;
        const f32x16 scale = low.scale(at), offset = low.offset(at);
        const u32x16 bits = words(high + at * 64);
        each_nibble(low.codes + at * 256, [&](int k, u32x16 code) {
            const u32x16 whole = code | ((bits >> (8 * (k % 4) + k / 4)) & 1u) << 4;
            store16(to + k * LANES, number((i32x16)whole) * scale - offset);
        });
    }
};

struct Q6K {
    const uint8_t *codes, *high;
    const int8_t *scales;
    const uint16_t *super_scales;
    void widen(int64_t t, int64_t g, int64_t groups, float *to) const {
        const int64_t at = t * groups + g;
        const f32x16 whole = load_halves(super_scales + at / 8 * LANES);
        const f32x16 scale[2] = {load_signed_bytes(scales + at * 2 * LANES) * whole,
                                 load_signed_bytes(scales + (at * 2 + 1) * LANES) * whole};
        const f32x16 offset[2] = {scale[0] * 32.0f, scale[1] * 32.0f};
        const u32x16 pairs[2] = {words(high + at * 128), words(high + at * 128 + 64)};
        // bits 0-1 of byte b of line h: k = 8h + b; 2-3: 16 + 8h + b; 4-5 and 6-7: those + 4
        each_nibble(codes + at * 256, [&](int k, u32x16 low) {
            const int half = k / 16, in_half = k % 16, field = in_half % 8 / 4 * 4 + half * 2;
            const u32x16 bits = (pairs[in_half / 8] >> (8 * (k % 4) + field)) & 3u;
            store16(to + k * LANES, number((i32x16)(low | bits << 4)) * scale[half] - offset[half]);
        });
    }
};

struct Q8 {
    const int8_t *codes;
    const uint16_t *scales;
    void widen(int64_t t, int64_t g, int64_t groups, float *to) const {
        const int64_t at = t * groups + g;
        const f32x16 scale = load_halves(scales + at * LANES);
        for (int i = 0; i < 8; i++) {
            const i32x16 line = (i32x16)words((const uint8_t *)codes + at * 512 + i * 64);
            for (int b = 0; b < 4; b++)
                store16(to + (4 * i + b) * LANES, number((line << (24 - 8 * b)) >> 24) * scale);
        }
    }
};

// Scales of groups of `size` columns; zeros of the same groups, or a single one.
struct Q4 {
    const uint8_t *codes;
    const uint16_t *scales;
    const uint8_t *zeros;
    int64_t size, single_zero;
    void widen(int64_t t, int64_t g, int64_t groups, float *to) const {
        const int64_t scale_at = t * (groups * GROUP / size) + g * GROUP / size;
        const f32x16 scale = load_halves(scales + scale_at * LANES);
        const f32x16 zero = single_zero ? splat(float(*zeros)) : load_bytes(zeros + scale_at * LANES);
        const f32x16 offset = scale * zero;
        each_nibble(codes + (t * groups + g) * 256,
                    [&](int k, u32x16 code) { store16(to + k * LANES, number((i32x16)code) * scale - offset); });
    }
};

struct Q41 {
    const uint8_t *codes;
    const uint16_t *scales, *mins;
    void widen(int64_t t, int64_t g, int64_t groups, float *to) const {
        const int64_t at = t * groups + g;
        const f32x16 scale = load_halves(scales + at * LANES), least = load_halves(mins + at * LANES);
        each_nibble(codes + at * 256,
                    [&](int k, u32x16 code) { store16(to + k * LANES, number((i32x16)code) * scale + least); });
    }
};

// sums [ROWS][16] += rows x a widened tile [inputs][16].
template <int ROWS> void block(const float *tile, int64_t inputs, const float *x, float *sums) {
    register_floats acc[ROWS][SPLIT];
#pragma GCC unroll 32
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int s = 0; s < SPLIT; s++) acc[m][s] = *(register_floats *)(sums + m * LANES + s * REGISTER_LANES);
    for (int64_t k = 0; k < inputs; k++) {
        const register_floats *w = (const register_floats *)(tile + k * LANES);
#pragma GCC unroll 32
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
            for (int s = 0; s < SPLIT; s++) acc[m][s] = w[s] * x[m * ROW + k] + acc[m][s];
    }
#pragma GCC unroll 32
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int s = 0; s < SPLIT; s++) *(register_floats *)(sums + m * LANES + s * REGISTER_LANES) = acc[m][s];
}

using Block = void (*)(const float *, int64_t, const float *, float *);
template <int... ROWS> Block block_of(int64_t rows, std::integer_sequence<int, ROWS...>) {
    static const Block table[] = {block<ROWS + 1>...};
    return table[rows - 1];
}

thread_local Scratch row_tiles, thread_buffers;

template <class W, class T>
void multiply(const W &weight, const T *x, int64_t M, int64_t K, int64_t N, T *y, int64_t y_stride, int threads) {
    if (M == 0) return;
    float *tiles = row_tiles.get((K + CHUNK - 1) / CHUNK * M * ROW);
    widen_rows<CHUNK>(x, K, M, K, tiles, threads);
    const int64_t count = (N + LANES - 1) / LANES, groups = K / GROUP, blocks = (M + BLOCK - 1) / BLOCK;
    if (M * K * N < 1 << 16) threads = 1;
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *tile = thread_buffers.get(CHUNK * LANES + M * LANES), *sums = tile + CHUNK * LANES;
        for (int64_t t; (t = next++) < count;) {
            memset(sums, 0, M * LANES * sizeof(float));
            for (int64_t k = 0; k < K; k += CHUNK) {
                const int64_t inputs = std::min<int64_t>(CHUNK, K - k);
                for (int64_t g = 0; g < inputs; g += GROUP) weight.widen(t, (k + g) / GROUP, groups, tile + g * LANES);
                for (int64_t b = 0; b < blocks; b++) {
                    const int64_t from = M * b / blocks, rows = M * (b + 1) / blocks - from;
                    block_of(rows, std::make_integer_sequence<int, BLOCK>())(
                        tile, inputs, tiles + (k / CHUNK * M + from) * ROW, sums + from * LANES);
                }
            }
            for (int64_t m = 0; m < M; m++)
                store_outputs(y + m * y_stride + t * LANES, *(const f32x16 *)(sums + m * LANES), N - t * LANES);
        }
    }
}

}  // namespace

#define MAX_RAY_QUANTIZED(NAME, T)                                                                                        \
    void q4k_linear_##NAME(const QuantizedMatrix *w, const T *x, int64_t M, int64_t K, int64_t N, T *y, int64_t y_stride, \
                           int threads) {                                                                                 \
        const Q4K weight{w->codes, w->scales, w->mins, w->super_scales, w->super_mins};                                   \
        multiply(weight, x, M, K, N, y, y_stride, threads);                                                               \
    }                                                                                                                     \
    void q5k_linear_##NAME(const QuantizedMatrix *w, const T *x, int64_t M, int64_t K, int64_t N, T *y, int64_t y_stride, \
                           int threads) {                                                                                 \
        const Q5K weight{{w->codes, w->scales, w->mins, w->super_scales, w->super_mins}, w->high_codes};                  \
        multiply(weight, x, M, K, N, y, y_stride, threads);                                                               \
    }                                                                                                                     \
    void q6k_linear_##NAME(const QuantizedMatrix *w, const T *x, int64_t M, int64_t K, int64_t N, T *y, int64_t y_stride, \
                           int threads) {                                                                                 \
        const Q6K weight{w->codes, w->high_codes, (const int8_t *)w->scales, w->super_scales};                            \
        multiply(weight, x, M, K, N, y, y_stride, threads);                                                               \
    }                                                                                                                     \
    void q8_linear_##NAME(const QuantizedMatrix *w, const T *x, int64_t M, int64_t K, int64_t N, T *y, int64_t y_stride,  \
                          int threads) {                                                                                  \
        multiply(Q8{(const int8_t *)w->codes, w->super_scales}, x, M, K, N, y, y_stride, threads);                        \
    }                                                                                                                     \
    void q4_linear_##NAME(const QuantizedMatrix *w, const T *x, int64_t M, int64_t K, int64_t N, T *y, int64_t y_stride,  \
                          int threads) {                                                                                  \
        const Q4 weight{w->codes, w->super_scales, w->mins, w->group_size, w->single_zero};                               \
        multiply(weight, x, M, K, N, y, y_stride, threads);                                                               \
    }                                                                                                                     \
    void q41_linear_##NAME(const QuantizedMatrix *w, const T *x, int64_t M, int64_t K, int64_t N, T *y, int64_t y_stride, \
                           int threads) {                                                                                 \
        multiply(Q41{w->codes, w->super_scales, w->super_mins}, x, M, K, N, y, y_stride, threads);                        \
    }

extern "C" {
MAX_RAY_QUANTIZED(f32, float)
MAX_RAY_QUANTIZED(bf16, bf16)
MAX_RAY_QUANTIZED(f16, f16)
}

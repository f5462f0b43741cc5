// Norms, the gated activation, rope with the cache write, and what a decode step looks up. Each rounds where the reference implementation rounds (rope rounds once,
// the twin after each product). Rows are shared among threads when there is enough to do.
#include "kernels.h"
#include <algorithm>
#include <cmath>
#include <omp.h>

namespace {

constexpr int64_t PARALLEL_ELEMENTS = 1 << 16;  // below, waking a second thread costs more than it saves

// Loops over n elements in vectors; `body(i, left)` gets the offset and how many of the 16 lanes count.
template <class F> static inline void lanes(int64_t n, F body) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) body(i, LANES);
    if (i < n) body(i, n - i);
}
template <class T> static inline f32x16 load_lanes(const T *p, int64_t left) {
    return left >= LANES ? load16(p) : load_part(p, left);
}
template <class T> static inline void store_lanes(T *p, f32x16 x, int64_t left) {
    if (left >= LANES)
        store16(p, x);
    else
        store_part(p, x, left);
}

template <class T> void norm_row(const T *x, const T *weight, T *y, int64_t D, float eps) {
    f32x16 squares = {};
    lanes(D, [&](int64_t i, int64_t left) {
        f32x16 v = load_lanes(x + i, left);
        squares += v * v;
    });
    const float scale = 1.0f / std::sqrt(sum(squares) / float(D) + eps);
    lanes(D, [&](int64_t i, int64_t left) {
        f32x16 v = rounded<T>(load_lanes(x + i, left) * scale);
        store_lanes(y + i, v * load_lanes(weight + i, left), left);
    });
}

template <class T>
void rmsnorm(const T *x, const T *weight, T *y, int64_t rows, int64_t D, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * D > PARALLEL_ELEMENTS)
    for (int64_t r = 0; r < rows; r++) norm_row(x + r * D, weight, y + r * D, D, eps);
}

template <class T>
void add_rmsnorm(const T *x, const T *residual, const T *weight, T *y, T *total, int64_t rows, int64_t D, float eps,
                 int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * D > PARALLEL_ELEMENTS)
    for (int64_t r = 0; r < rows; r++) {
        lanes(D, [&](int64_t i, int64_t left) {
            f32x16 v = load_lanes(x + r * D + i, left) + load_lanes(residual + r * D + i, left);
            store_lanes(total + r * D + i, v, left);
        });
        norm_row(total + r * D, weight, y + r * D, D, eps);
    }
}

template <class T> void silu_and_mul(const T *x, T *y, int64_t rows, int64_t F, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * F > PARALLEL_ELEMENTS)
    for (int64_t r = 0; r < rows; r++) {
        const T *gate = x + r * 2 * F, *up = gate + F;
        lanes(F, [&](int64_t i, int64_t left) {
            f32x16 g = load_lanes(gate + i, left);
            f32x16 silu = rounded<T>(g / (vexp(-vmax(g, splat(-88.0f))) + 1.0f));
            store_lanes(y + r * F + i, silu * load_lanes(up + i, left), left);
        });
    }
}

// One head [D] of which the first R values turn; cos, sin [R / 2].
template <class T>
void rotate(const T *x, T *y, const float *cos, const float *sin, int64_t R, int64_t D, bool interleaved) {
    const int64_t P = R / 2;
    if (!interleaved) {
        lanes(P, [&](int64_t i, int64_t left) {
            f32x16 a = load_lanes(x + i, left), b = load_lanes(x + P + i, left);
            f32x16 c = load_lanes(cos + i, left), s = load_lanes(sin + i, left);
            store_lanes(y + i, a * c - b * s, left);
            store_lanes(y + P + i, b * c + a * s, left);
        });
    } else {
        for (int64_t i = 0; i < P; i++) {
            const float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
            store_part(y + 2 * i, splat(a * cos[i] - b * sin[i]), 1);
            store_part(y + 2 * i + 1, splat(b * cos[i] + a * sin[i]), 1);
        }
    }
    std::copy(x + R, x + D, y + R);
}

template <class T>
void rope_and_append(const T *q, const T *k, const T *v, T *q_out, T *k_cache, T *v_cache, const T *cos_sin,
                     const int64_t *positions, const int64_t *slots, const RopeShape &s, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && s.T * s.H * s.D > PARALLEL_ELEMENTS)
    for (int64_t t = 0; t < s.T; t++) {
        float angles[1024];
        const T *from = cos_sin + (positions ? positions[t] : t) * s.R;
        lanes(s.R, [&](int64_t i, int64_t left) { store_lanes(angles + i, load_lanes(from + i, left), left); });
        const float *cos = angles, *sin = angles + s.R / 2;
        for (int64_t h = 0; h < s.H; h++)
            rotate(q + t * s.q_stride + h * s.D, q_out + (t * s.H + h) * s.D, cos, sin, s.R, s.D, s.interleaved);
        T *k_to = k_cache + slots[t] * s.KVH * s.D;
        for (int64_t h = 0; h < s.KVH; h++)
            rotate(k + t * s.k_stride + h * s.D, k_to + h * s.D, cos, sin, s.R, s.D, s.interleaved);
        std::copy(v + t * s.v_stride, v + t * s.v_stride + s.KVH * s.D, v_cache + slots[t] * s.KVH * s.D);
    }
}

// The first of the largest; NaN loses against every number.
template <class T> int64_t argmax_row(const T *x, int64_t V) {
    f32x16 best = splat(-INFINITY);
    i32x16 where = splat_int(-1), block = splat_int(0);
    int64_t i = 0;
    for (; i + LANES <= V; i += LANES, block += 1) {
        f32x16 value = load16(x + i);
        i32x16 better = (i32x16)(value > best);
        best = better ? value : best;
        where = better ? block : where;
    }
    float top = -INFINITY;
    int64_t index = 0;
    bool found = false;
    for (int lane = 0; lane < LANES; lane++) {
        if (where[lane] < 0) continue;
        const int64_t at = int64_t(where[lane]) * LANES + lane;
        if (!found || best[lane] > top || (best[lane] == top && at < index)) top = best[lane], index = at, found = true;
    }
    for (; i < V; i++)
        if (to_float(x[i]) > top) top = to_float(x[i]), index = i;
    return index;
}

template <class T> void argmax(const T *x, int64_t stride, int64_t rows, int64_t V, int64_t *y, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 1 && rows * V > PARALLEL_ELEMENTS)
    for (int64_t r = 0; r < rows; r++) y[r] = argmax_row(x + r * stride, V);
}

// y = x[0] + x[1] + ..., in this order, in floats and rounded once.
template <class T> void sum_rows(const T *x, int64_t rows, int64_t width, T *y) {
    lanes(width, [&](int64_t i, int64_t left) {
        f32x16 total = load_lanes(x + i, left);
        for (int64_t r = 1; r < rows; r++) total += load_lanes(x + r * width + i, left);
        store_lanes(y + i, total, left);
    });
}

}  // namespace

#define MAX_RAY_EXPORT(NAME, T)                                                                                           \
    void rmsnorm_##NAME(const T *x, const T *weight, T *y, int64_t rows, int64_t D, float eps, int threads) {             \
        rmsnorm<T>(x, weight, y, rows, D, eps, threads);                                                                  \
    }                                                                                                                     \
    void add_rmsnorm_##NAME(const T *x, const T *residual, const T *weight, T *y, T *total, int64_t rows, int64_t D,      \
                            float eps, int threads) {                                                                     \
        add_rmsnorm<T>(x, residual, weight, y, total, rows, D, eps, threads);                                             \
    }                                                                                                                     \
    void silu_and_mul_##NAME(const T *x, T *y, int64_t rows, int64_t F, int threads) {                                    \
        silu_and_mul<T>(x, y, rows, F, threads);                                                                          \
    }                                                                                                                     \
    void gather_rows_##NAME(const T *x, int64_t stride, const int64_t *rows, int64_t count, int64_t D, T *y) {            \
        for (int64_t i = 0; i < count; i++) std::copy_n(x + rows[i] * stride, D, y + i * D);                              \
    }                                                                                                                     \
    void sum_rows_##NAME(const T *x, int64_t rows, int64_t width, T *y) { sum_rows<T>(x, rows, width, y); }               \
    void argmax_##NAME(const T *x, int64_t stride, int64_t rows, int64_t V, int64_t *y, int threads) {                    \
        argmax<T>(x, stride, rows, V, y, threads);                                                                        \
    }                                                                                                                     \
    void rope_and_append_##NAME(const T *q, const T *k, const T *v, T *q_out, T *k_cache, T *v_cache,                     \
                                const T *cos_sin, const int64_t *positions, const int64_t *slots,                         \
                                const RopeShape *shape, int threads) {                                                    \
        rope_and_append<T>(q, k, v, q_out, k_cache, v_cache, cos_sin, positions, slots, *shape, threads);                 \
    }

extern "C" {
MAX_RAY_EXPORT(f32, float)
MAX_RAY_EXPORT(bf16, bf16)
MAX_RAY_EXPORT(f16, f16)

void decode_slots_i64(const int32_t *tables, int64_t width, const int32_t *lengths, int64_t rows, int64_t page_size, int64_t *y) {
    for (int64_t r = 0; r < rows; r++)
        y[r] = tables[r * width + lengths[r] / page_size] * page_size + lengths[r] % page_size;
}
void positions_i64(const int32_t *lengths, int64_t rows, int64_t *y) { std::copy_n(lengths, rows, y); }
}

// What kernels share: memory of a thread, rows widened into it, finished outputs.
#pragma once
#include "vec.h"
#include <algorithm>
#include <cstdlib>

constexpr int ROW_PAD = 16;  // floats between rows of a tile: powers of two would fall into the same cache sets

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Memory on a cache line's border, kept between calls; meant to be thread_local.
struct Scratch {
    void *data = nullptr;
    size_t size = 0;
    template <class T = float> T *get(size_t count) {
        if (count * sizeof(T) > size) {
            free(data);
            size = count * sizeof(T);
            if (posix_memalign(&data, 64, size)) abort();
        }
        return (T *)data;
    }
    Scratch() = default;
    Scratch(const Scratch &) = delete;
    ~Scratch() { free(data); }
};

// Rows [M][K] as floats in tiles [chunk][M][CHUNK + ROW_PAD], zeros past K up to an even number.
template <int CHUNK, class T>
void widen_rows(const T *x, int64_t stride, int64_t M, int64_t K, float *tiles, int threads) {
    constexpr int ROW = CHUNK + ROW_PAD;
    int64_t chunks = (K + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) if (threads > 1 && M * K > 1 << 17)
    for (int64_t m = 0; m < M; m++)
        for (int64_t c = 0; c < chunks; c++) {
            float *to = tiles + (c * M + m) * ROW;
            const T *from = x + m * stride + c * CHUNK;
            int64_t n = std::min<int64_t>(CHUNK, K - c * CHUNK), k = 0;
            for (; k + LANES <= n; k += LANES) *(f32x16 *)(to + k) = load16(from + k);
            if (k < n) *(f32x16 *)(to + k) = load_part(from + k, n - k), k += LANES;
            for (; k < std::min<int64_t>(CHUNK, round_up(n, 2)); k += LANES) *(f32x16 *)(to + k) = f32x16{};
        }
}

// Up to 16 outputs of a row; `left`: how many of them the row has.
template <class T> static inline void store_outputs(T *y, f32x16 value, int64_t left) {
    if (left >= LANES)
        store16(y, value);
    else
        store_part(y, value, left);
}

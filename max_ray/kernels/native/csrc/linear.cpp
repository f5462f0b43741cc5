// y = x W^T + b, from weights packed once.
//
// Packed layout, outputs N in panels of 32 (the last one padded with zeros), inputs K padded with a zero to an even number:
//
//     float   [panel][k][32]             one float a weight
//     bf16    [panel][k / 2][32]         one 32-bit word a pair of weights: k even in the low half, k odd in the high one
//
// Widening a bf16 to float is then one shift or one mask of a whole vector. Every output is one chain of fused
// multiply-adds in the order of k, whatever the number of rows: a row's result does not depend on its batch.
//
// Rows M <= SMALL_ROWS read the packed weights directly (memory decides); more rows widen a tile of weights once and use
// it for all rows (arithmetic decides). Threads take pairs of panels from a common counter, so that a core that
// is taken away for a while holds up nothing but its own pair.
#include "vec.h"
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <omp.h>
#include <sys/mman.h>

namespace {

constexpr int PANEL = 32;
constexpr int VECS = PANEL / LANES;
constexpr int SMALL_ROWS = 32;
constexpr int SMALL_BLOCK = 14;  // rows at once: 14 x 2 accumulators in 32 registers
constexpr int SMALL_CHUNK = 256;  // inputs at once
constexpr int LARGE_BLOCK = 6;  // rows at once: 6 x 4 accumulators
constexpr int LARGE_CHUNK = 128;
constexpr int64_t LARGE_ROW_BYTES = 8 << 20;  // of widened rows: they are read once a pair of panels and shall stay in cache
constexpr int ROW_PAD = 16;  // floats between rows of a tile: powers of two would fall into the same cache sets
constexpr int PREFETCH = 2048;  // bytes ahead

// Memory of one thread, kept between calls.
struct Scratch {
    float *data = nullptr;
    size_t size = 0;
    float *get(size_t count) {
        if (count > size) {
            free(data);
            size = count;
            if (posix_memalign((void **)&data, 64, count * sizeof(float))) abort();
        }
        return data;
    }
    ~Scratch() { free(data); }
};

template <class T> struct Packed;

template <> struct Packed<float> {
    static int64_t panel_words(int64_t K) { return K * PANEL; }
    typedef float Word;
    // The weights of inputs k and k + 1 of 16 outputs, from vector v of a panel.
    static inline void widen(const float *panel, int64_t pair, int v, f32x16 &even, f32x16 &odd) {
        even = load16(panel + pair * 2 * PANEL + v * LANES);
        odd = load16(panel + pair * 2 * PANEL + PANEL + v * LANES);
    }
};

template <> struct Packed<bf16> {
    static int64_t panel_words(int64_t K) { return K / 2 * PANEL; }
    typedef uint32_t Word;
    static inline void widen(const uint32_t *panel, int64_t pair, int v, f32x16 &even, f32x16 &odd) {
        u32x16 both = *(const u32x16u *)(panel + pair * PANEL + v * LANES);
        even = (f32x16)(both << 16);
        odd = (f32x16)(both & 0xffff0000u);
    }
};

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Rows [M][K] as floats in tiles [chunk][M][CHUNK + ROW_PAD], zeros past K.
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

// sums [ROWS][SUM_STRIDE] += rows x weights, over `pairs` pairs of inputs; V vectors of one or two panels.
template <class T, int ROWS, int V>
inline void small_block(const typename Packed<T>::Word *const *panels, int64_t pairs, const float *x, float *sums) {
    constexpr int ROW = SMALL_CHUNK + ROW_PAD;
    f32x16 acc[ROWS][V];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) acc[m][v] = *(f32x16 *)(sums + m * 2 * PANEL + v * LANES);
    for (int64_t p = 0; p < pairs; p++) {
        f32x16 even[V], odd[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            Packed<T>::widen(panels[v / VECS], p, v % VECS, even[v], odd[v]);
            if (v % VECS == 0) {
                const char *at = (const char *)(panels[v / VECS] + p * PANEL * 4 / sizeof(typename Packed<T>::Word) * (sizeof(T) / 2));
                __builtin_prefetch(at + PREFETCH);
                __builtin_prefetch(at + PREFETCH + 64);
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                acc[m][v] = even[v] * x[m * ROW + 2 * p] + acc[m][v];
                acc[m][v] = odd[v] * x[m * ROW + 2 * p + 1] + acc[m][v];
            }
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) *(f32x16 *)(sums + m * 2 * PANEL + v * LANES) = acc[m][v];
}

template <class T> using SmallBlock = void (*)(const typename Packed<T>::Word *const *, int64_t, const float *, float *);

template <class T, int V> SmallBlock<T> small_block_of(int rows) {
    static const SmallBlock<T> table[] = {
        small_block<T, 1, V>,  small_block<T, 2, V>,  small_block<T, 3, V>,  small_block<T, 4, V>,  small_block<T, 5, V>,
        small_block<T, 6, V>,  small_block<T, 7, V>,  small_block<T, 8, V>,  small_block<T, 9, V>,  small_block<T, 10, V>,
        small_block<T, 11, V>, small_block<T, 12, V>, small_block<T, 13, V>, small_block<T, 14, V>};
    return table[rows - 1];
}

// One finished row of up to 64 outputs: bias, rounding, out.
template <class T> void write_row(const float *sums, const T *bias, T *y, int64_t count) {
    for (int64_t n = 0; n < count; n += LANES) {
        f32x16 value = *(const f32x16 *)(sums + n);
        int64_t left = count - n;
        if (left >= LANES) {
            if (bias) value = rounded<T>(value) + load16(bias + n);
            store16(y + n, value);
        } else {
            if (bias) value = rounded<T>(value) + load_part(bias + n, left);
            store_part(y + n, value, left);
        }
    }
}

// A pair of panels (or the single last one) for all rows of a small batch.
template <class T>
void small_pair(const typename Packed<T>::Word *packed, const float *tiles, int64_t M, int64_t K, int64_t N, int64_t n,
                const T *bias, T *y, int64_t y_stride, float *sums) {
    constexpr int ROW = SMALL_CHUNK + ROW_PAD;
    const int64_t words = Packed<T>::panel_words(round_up(K, 2));
    const bool both = N - n > PANEL;
    const int64_t blocks = (M + SMALL_BLOCK - 1) / SMALL_BLOCK;
    memset(sums, 0, M * 2 * PANEL * sizeof(float));
    for (int64_t k = 0, c = 0; k < K; k += SMALL_CHUNK, c++) {
        const int64_t pairs = round_up(std::min<int64_t>(SMALL_CHUNK, K - k), 2) / 2;
        const typename Packed<T>::Word *first = packed + n / PANEL * words + Packed<T>::panel_words(k);
        const typename Packed<T>::Word *panels[2] = {first, first + words};
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t from = M * b / blocks, rows = M * (b + 1) / blocks - from;
            const float *x = tiles + (c * M + from) * ROW;
            float *block_sums = sums + from * 2 * PANEL;
            if (both && rows <= 6) {
                small_block_of<T, 2 * VECS>(rows)(panels, pairs, x, block_sums);
            } else {
                small_block_of<T, VECS>(rows)(panels, pairs, x, block_sums);
                if (both) small_block_of<T, VECS>(rows)(panels + 1, pairs, x, block_sums + PANEL);
            }
        }
    }
    for (int64_t m = 0; m < M; m++)
        write_row(sums + m * 2 * PANEL, bias ? bias + n : nullptr, y + m * y_stride + n, std::min<int64_t>(2 * PANEL, N - n));
}

// sums [ROWS][64] += rows x a widened tile of weights [chunk][64].
template <int ROWS> inline void large_block(const float *weights, int64_t inputs, const float *x, float *sums) {
    constexpr int ROW = LARGE_CHUNK + ROW_PAD;
    constexpr int V = 2 * VECS;
    f32x16 acc[ROWS][V];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) acc[m][v] = *(f32x16 *)(sums + m * 2 * PANEL + v * LANES);
    for (int64_t k = 0; k < inputs; k++) {
        f32x16 w[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) w[v] = *(const f32x16 *)(weights + k * 2 * PANEL + v * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[m][v] = w[v] * x[m * ROW + k] + acc[m][v];
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) *(f32x16 *)(sums + m * 2 * PANEL + v * LANES) = acc[m][v];
}

template <class T>
void widen_weights(const typename Packed<T>::Word *panel, int64_t pairs, float *tile) {
    for (int64_t p = 0; p < pairs; p++)
        for (int v = 0; v < VECS; v++) {
            f32x16 even, odd;
            Packed<T>::widen(panel, p, v, even, odd);
            *(f32x16 *)(tile + 2 * p * 2 * PANEL + v * LANES) = even;
            *(f32x16 *)(tile + (2 * p + 1) * 2 * PANEL + v * LANES) = odd;
        }
}

template <class T>
void large_pair(const typename Packed<T>::Word *packed, const float *tiles, int64_t M, int64_t K, int64_t N, int64_t n,
                const T *bias, T *y, int64_t y_stride, float *sums, float *tile) {
    constexpr int ROW = LARGE_CHUNK + ROW_PAD;
    const int64_t words = Packed<T>::panel_words(round_up(K, 2));
    memset(sums, 0, M * 2 * PANEL * sizeof(float));
    for (int64_t k = 0, c = 0; k < K; k += LARGE_CHUNK, c++) {
        const int64_t inputs = round_up(std::min<int64_t>(LARGE_CHUNK, K - k), 2);
        const typename Packed<T>::Word *first = packed + n / PANEL * words + Packed<T>::panel_words(k);
        widen_weights<T>(first, inputs / 2, tile);
        if (N - n > PANEL) widen_weights<T>(first + words, inputs / 2, tile + PANEL);
        int64_t m = 0;
        for (; m + LARGE_BLOCK <= M; m += LARGE_BLOCK)
            large_block<LARGE_BLOCK>(tile, inputs, tiles + (c * M + m) * ROW, sums + m * 2 * PANEL);
        for (; m < M; m++) large_block<1>(tile, inputs, tiles + (c * M + m) * ROW, sums + m * 2 * PANEL);
    }
    for (int64_t m = 0; m < M; m++)
        write_row(sums + m * 2 * PANEL, bias ? bias + n : nullptr, y + m * y_stride + n, std::min<int64_t>(2 * PANEL, N - n));
}

thread_local Scratch row_tiles, thread_sums;

template <class T>
void linear_some(const T *x, int64_t x_stride, int64_t M, int64_t K, const typename Packed<T>::Word *packed, int64_t N,
                 const T *bias, T *y, int threads) {
    const bool small = M <= SMALL_ROWS;
    const int64_t chunk = small ? SMALL_CHUNK : LARGE_CHUNK;
    float *tiles = row_tiles.get((K + chunk - 1) / chunk * M * (chunk + ROW_PAD));
    if (small)
        widen_rows<SMALL_CHUNK>(x, x_stride, M, K, tiles, threads);
    else
        widen_rows<LARGE_CHUNK>(x, x_stride, M, K, tiles, threads);
    const int64_t pairs = (N + 2 * PANEL - 1) / (2 * PANEL);
    if (M * K * N < 1 << 16) threads = 1;  // waking a second thread costs more
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *sums = thread_sums.get(M * 2 * PANEL + LARGE_CHUNK * 2 * PANEL);
        for (int64_t pair; (pair = next++) < pairs;) {
            const int64_t n = pair * 2 * PANEL;
            if (small)
                small_pair<T>(packed, tiles, M, K, N, n, bias, y, N, sums);
            else
                large_pair<T>(packed, tiles, M, K, N, n, bias, y, N, sums, sums + M * 2 * PANEL);
        }
    }
}

template <class T>
void linear(const T *x, int64_t x_stride, int64_t M, int64_t K, const void *packed, int64_t N, const T *bias, T *y,
            int threads) {
    const int64_t fits = M <= SMALL_ROWS ? M : std::max<int64_t>(96, LARGE_ROW_BYTES / 4 / K / LARGE_BLOCK * LARGE_BLOCK);
    for (int64_t m = 0; m < M; m += fits)
        linear_some<T>(x + m * x_stride, x_stride, std::min(fits, M - m), K, (const typename Packed<T>::Word *)packed, N,
                       bias, y + m * N, threads);
}

// W [N][K] into panels.
void pack_panel(const float *w, int64_t rows, int64_t K, float *to) {
    memset(to, 0, round_up(K, 2) * PANEL * sizeof(float));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < K; k++) to[k * PANEL + r] = w[r * K + k];
}
void pack_panel(const bf16 *w, int64_t rows, int64_t K, uint32_t *to) {
    memset(to, 0, round_up(K, 2) / 2 * PANEL * sizeof(uint32_t));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < K; k++) to[k / 2 * PANEL + r] |= uint32_t(w[r * K + k].bits) << (k % 2 * 16);
}

template <class T> void pack(const T *w, int64_t N, int64_t K, void *to, int threads) {
    const int64_t words = Packed<T>::panel_words(round_up(K, 2));
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n += PANEL)
        pack_panel(w + n * K, std::min<int64_t>(PANEL, N - n), K, (typename Packed<T>::Word *)to + n / PANEL * words);
}

template <class T> struct RowReader;
template <> struct RowReader<float> {
    static float at(const float *panel, int64_t r, int64_t k) { return panel[k * PANEL + r]; }
};
template <> struct RowReader<bf16> {
    static bf16 at(const uint32_t *panel, int64_t r, int64_t k) {
        return {uint16_t(panel[k / 2 * PANEL + r] >> (k % 2 * 16))};
    }
};

template <class T>
void unpack_rows(const void *packed, int64_t K, const int64_t *rows, int64_t count, T *y, int threads) {
    const int64_t words = Packed<T>::panel_words(round_up(K, 2));
#pragma omp parallel for num_threads(threads) if (threads > 1 && count > 8)
    for (int64_t i = 0; i < count; i++) {
        const auto *panel = (const typename Packed<T>::Word *)packed + rows[i] / PANEL * words;
        for (int64_t k = 0; k < K; k++) y[i * K + k] = RowReader<T>::at(panel, rows[i] % PANEL, k);
    }
}

}  // namespace

extern "C" {
void linear_f32(const float *x, int64_t x_stride, int64_t M, int64_t K, const void *packed, int64_t N, const float *bias,
                float *y, int threads) {
    linear<float>(x, x_stride, M, K, packed, N, bias, y, threads);
}
void linear_bf16(const bf16 *x, int64_t x_stride, int64_t M, int64_t K, const void *packed, int64_t N, const bf16 *bias,
                 bf16 *y, int threads) {
    linear<bf16>(x, x_stride, M, K, packed, N, bias, y, threads);
}
void pack_f32(const float *w, int64_t N, int64_t K, void *to, int threads) { pack<float>(w, N, K, to, threads); }
void pack_bf16(const bf16 *w, int64_t N, int64_t K, void *to, int threads) { pack<bf16>(w, N, K, to, threads); }
void rows_f32(const void *packed, int64_t K, const int64_t *rows, int64_t count, float *y, int threads) {
    unpack_rows<float>(packed, K, rows, count, y, threads);
}
void rows_bf16(const void *packed, int64_t K, const int64_t *rows, int64_t count, bf16 *y, int threads) {
    unpack_rows<bf16>(packed, K, rows, count, y, threads);
}
// Large pages save the page walks of a stream through gigabytes. A hint: where it is refused, all goes on as before.
void advise_huge_pages(void *start, int64_t bytes) {
    const uintptr_t page = 4096, from = ((uintptr_t)start + page - 1) / page * page;
    const uintptr_t to = ((uintptr_t)start + bytes) / page * page;
    if (to > from) madvise((void *)from, to - from, MADV_HUGEPAGE);
}
}

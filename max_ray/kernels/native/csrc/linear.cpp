// y = x W^T + b, from weights packed once.
//
// Packed layout: panels.h. Widening is then one instruction for a whole vector. Every output is one
// chain of fused multiply-adds in the order of k, whatever the number of rows: a row's result does not depend on its batch.
// (Where the processor multiplies bf16, linear_dot.cpp is faster.)
//
// Up to SMALL_ROWS rows use the packed weights directly, as they come from memory (the second half of the rows finds them
// in the first cache); more rows widen a tile of weights once and use it for all of them. Threads take groups of panels
// from a common counter: a core that is taken away for a while holds up nothing but its own group.
#include "kernels.h"
#include "panels.h"
#include "scratch.h"
#include <atomic>
#include <omp.h>
#include <utility>

namespace {

#ifdef __AVX512F__
constexpr int SMALL_BLOCK = 28;  // rows at once: 28 accumulators with one panel; up to 14 rows take two, up to 6 four
constexpr int TWO_PANELS = 14, FOUR_PANELS = 6;
constexpr int LARGE_PANELS = 4;  // at once, with LARGE_BLOCK rows: 6 x 4 accumulators
#else  // 12 accumulators of eight floats, as AVX2 has 16 registers
constexpr int SMALL_BLOCK = 6, TWO_PANELS = 3, FOUR_PANELS = 1, LARGE_PANELS = 1;
#endif
constexpr int SMALL_ROWS = 56;
constexpr int SMALL_CHUNK = 256;  // inputs at once
constexpr int LARGE_BLOCK = 6;  // rows at once
constexpr int LARGE_CHUNK = 64;  // inputs at once: a tile of 64 x 64 floats is half of the first cache
constexpr int64_t LARGE_ROW_BYTES = 8 << 20;  // of widened rows: they are read once a group and shall stay in cache
constexpr int PREFETCH = 1024;  // bytes ahead in a panel: 10 to 18 % faster than the processor's own prefetching alone

// sums [ROWS][64] += rows x weights of V panels, over `pairs` pairs of inputs.
template <class T, int ROWS, int V>
void small_block(const typename Packed<T>::Word *const *panels, int64_t pairs, const float *x, float *sums) {
    constexpr int ROW = SMALL_CHUNK + ROW_PAD;
    const typename Packed<T>::Word *from[V];
    for (int v = 0; v < V; v++) from[v] = panels[v];
    register_floats acc[ROWS][V * SPLIT];
#pragma GCC unroll 32
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 16
        for (int v = 0; v < V * SPLIT; v++) acc[m][v] = *(register_floats *)(sums + m * WIDTH + v * REGISTER_LANES);
    for (int64_t p = 0; p < pairs; p++) {
        f32x16 even[V], odd[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            Packed<T>::widen(from[v], p, even[v], odd[v]);
            __builtin_prefetch((const char *)(from[v] + p * PANEL) + PREFETCH);
        }
        const register_floats *evens = (const register_floats *)even, *odds = (const register_floats *)odd;
#pragma GCC unroll 32
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 16
            for (int v = 0; v < V * SPLIT; v++) acc[m][v] = evens[v] * x[m * ROW + 2 * p] + acc[m][v];
#pragma GCC unroll 32
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 16
            for (int v = 0; v < V * SPLIT; v++) acc[m][v] = odds[v] * x[m * ROW + 2 * p + 1] + acc[m][v];
    }
#pragma GCC unroll 32
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 16
        for (int v = 0; v < V * SPLIT; v++) *(register_floats *)(sums + m * WIDTH + v * REGISTER_LANES) = acc[m][v];
}

template <class T> using SmallBlock = void (*)(const typename Packed<T>::Word *const *, int64_t, const float *, float *);

template <class T, int V, int... ROWS> SmallBlock<T> small_block_of(int64_t rows, std::integer_sequence<int, ROWS...>) {
    static const SmallBlock<T> table[] = {small_block<T, ROWS + 1, V>...};
    return table[rows - 1];
}

// One pass over the first of `left` panels for M rows, the largest block of `most`. Gives how many panels it took.
template <class T>
int64_t small_pass(const typename Packed<T>::Word *const *panels, int64_t left, int64_t pairs, const float *x, int64_t M,
                   int64_t most, float *sums) {
    if (left >= 4 && most <= FOUR_PANELS)
        return small_block_of<T, 4>(M, std::make_integer_sequence<int, FOUR_PANELS>())(panels, pairs, x, sums), 4;
    if (left >= 2 && most <= TWO_PANELS)
        return small_block_of<T, 2>(M, std::make_integer_sequence<int, TWO_PANELS>())(panels, pairs, x, sums), 2;
    return small_block_of<T, 1>(M, std::make_integer_sequence<int, SMALL_BLOCK>())(panels, pairs, x, sums), 1;
}

// A group of panels (the last one may have fewer) for all rows of a small batch.
template <class T>
void small_group(const typename Packed<T>::Word *packed, const float *tiles, int64_t M, int64_t K, int64_t N, int64_t n,
                 const T *bias, T *y, float *sums) {
    constexpr int ROW = SMALL_CHUNK + ROW_PAD;
    const int64_t words = Packed<T>::panel_words(round_up(K, 2)), count = panels_left(N, n);
    const int64_t blocks = (M + SMALL_BLOCK - 1) / SMALL_BLOCK, most = (M + blocks - 1) / std::max<int64_t>(1, blocks);
    memset(sums, 0, M * WIDTH * sizeof(float));
    for (int64_t k = 0, c = 0; k < K; k += SMALL_CHUNK, c++) {
        const int64_t pairs = round_up(std::min<int64_t>(SMALL_CHUNK, K - k), 2) / 2;
        const typename Packed<T>::Word *panels[GROUP];
        for (int64_t v = 0; v < count; v++) panels[v] = packed + (n / PANEL + v) * words + Packed<T>::panel_words(k);
        for (int64_t v = 0, taken = 1; v < count; v += taken)
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t from = M * b / blocks, rows = M * (b + 1) / blocks - from;
                const float *x = tiles + (c * M + from) * ROW;
                taken = small_pass<T>(panels + v, count - v, pairs, x, rows, most, sums + from * WIDTH + v * LANES);
            }
    }
    for (int64_t m = 0; m < M; m++)
        write_row(sums + m * WIDTH, bias ? bias + n : nullptr, y + m * N + n, std::min<int64_t>(WIDTH, N - n));
}

// sums [ROWS][64] += rows x a widened tile of weights [chunk][64], V panels of it.
template <int ROWS, int V> inline void large_part(const float *weights, int64_t inputs, const float *x, float *sums) {
    constexpr int ROW = LARGE_CHUNK + ROW_PAD;
    register_floats acc[ROWS][V * SPLIT];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 16
        for (int v = 0; v < V * SPLIT; v++) acc[m][v] = *(register_floats *)(sums + m * WIDTH + v * REGISTER_LANES);
    for (int64_t k = 0; k < inputs; k++) {
        if (k % LANES == 0)  // the next rows' floats of these inputs
            for (int m = 0; m < ROWS; m++) __builtin_prefetch(x + (ROWS + m) * ROW + k);
        const register_floats *w = (const register_floats *)(weights + k * WIDTH);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 16
            for (int v = 0; v < V * SPLIT; v++) acc[m][v] = w[v] * x[m * ROW + k] + acc[m][v];
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 16
        for (int v = 0; v < V * SPLIT; v++) *(register_floats *)(sums + m * WIDTH + v * REGISTER_LANES) = acc[m][v];
}

template <int ROWS> inline void large_block(const float *weights, int64_t inputs, const float *x, float *sums) {
    for (int v = 0; v < WIDTH; v += LARGE_PANELS * LANES) large_part<ROWS, LARGE_PANELS>(weights + v, inputs, x, sums + v);
}

// One panel's weights of `pairs` pairs of inputs, into a column of a tile [inputs][64].
template <class T> void widen_weights(const typename Packed<T>::Word *panel, int64_t pairs, float *tile) {
    for (int64_t p = 0; p < pairs; p++) {
        f32x16 even, odd;
        Packed<T>::widen(panel, p, even, odd);
        *(f32x16 *)(tile + 2 * p * WIDTH) = even;
        *(f32x16 *)(tile + (2 * p + 1) * WIDTH) = odd;
    }
}

template <class T>
void large_group(const typename Packed<T>::Word *packed, const float *tiles, int64_t M, int64_t K, int64_t N, int64_t n,
                 const T *bias, T *y, float *sums, float *tile) {
    constexpr int ROW = LARGE_CHUNK + ROW_PAD;
    const int64_t words = Packed<T>::panel_words(round_up(K, 2)), count = panels_left(N, n);
    memset(sums, 0, M * WIDTH * sizeof(float));
    for (int64_t k = 0, c = 0; k < K; k += LARGE_CHUNK, c++) {
        const int64_t inputs = round_up(std::min<int64_t>(LARGE_CHUNK, K - k), 2);
        const typename Packed<T>::Word *first = packed + n / PANEL * words + Packed<T>::panel_words(k);
        for (int64_t v = 0; v < count; v++) widen_weights<T>(first + v * words, inputs / 2, tile + v * LANES);
        const float *x = tiles + c * M * ROW;
        int64_t m = 0;
        for (; m + LARGE_BLOCK <= M; m += LARGE_BLOCK)
            large_block<LARGE_BLOCK>(tile, inputs, x + m * ROW, sums + m * WIDTH);
        x += m * ROW;
        float *tail = sums + m * WIDTH;
        switch (M - m) {
        case 1: large_block<1>(tile, inputs, x, tail); break;
        case 2: large_block<2>(tile, inputs, x, tail); break;
        case 3: large_block<3>(tile, inputs, x, tail); break;
        case 4: large_block<4>(tile, inputs, x, tail); break;
        case 5: large_block<5>(tile, inputs, x, tail); break;
        }
    }
    for (int64_t m = 0; m < M; m++)
        write_row(sums + m * WIDTH, bias ? bias + n : nullptr, y + m * N + n, std::min<int64_t>(WIDTH, N - n));
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
    const int64_t groups = (N + WIDTH - 1) / WIDTH;
    if (M * K * N < 1 << 16) threads = 1;  // waking a second thread costs more
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *sums = thread_sums.get((M + LARGE_CHUNK) * WIDTH);
        for (int64_t group; (group = next++) < groups;) {
            if (small)
                small_group<T>(packed, tiles, M, K, N, group * WIDTH, bias, y, sums);
            else
                large_group<T>(packed, tiles, M, K, N, group * WIDTH, bias, y, sums, sums + M * WIDTH);
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

// W [N][K] into panels. A word is a float, or a pair of halves as it stands in memory: a panel is its rows' words, turned.
void pack_words(const char *w, int64_t row_bytes, int64_t rows, int64_t words, float *to) {
    for (int64_t k = 0; k < words; k += LANES) {
        const int64_t count = std::min<int64_t>(LANES, words - k);
        f32x16 in[LANES] = {};
        for (int64_t r = 0; r < rows; r++) {
            const float *from = (const float *)(w + r * row_bytes) + k;
            in[r] = count == LANES ? load16(from) : load_part(from, count);
        }
        if (count == LANES) {
            transpose16(in, to + k * PANEL, PANEL);
            continue;
        }
        float turned[LANES * PANEL];
        transpose16(in, turned, PANEL);
        memcpy(to + k * PANEL, turned, count * PANEL * sizeof(float));
    }
}

// What is left to do with the turned words of a panel.
template <class T> void settle(typename Packed<T>::Word *, int64_t) {}
template <> void settle<f16>(uint32_t *panel, int64_t words) {
    for (uint32_t *pairs = panel; pairs < panel + words; pairs += PANEL) {
        uint16_t apart[2][PANEL];
        for (int r = 0; r < PANEL; r++) apart[0][r] = uint16_t(pairs[r]), apart[1][r] = uint16_t(pairs[r] >> 16);
        memcpy(pairs, apart, sizeof(apart));
    }
}

template <class T> void pack(const T *w, int64_t N, int64_t K, void *to, int threads) {
    const int64_t words = Packed<T>::panel_words(round_up(K, 2)), whole = K * int64_t(sizeof(T)) / 4;
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n += PANEL) {
        const int64_t rows = std::min<int64_t>(PANEL, N - n);
        auto *panel = (typename Packed<T>::Word *)to + n / PANEL * words;
        pack_words((const char *)(w + n * K), K * sizeof(T), rows, whole, (float *)panel);
        if (K % 2) {
            memset(panel + whole * PANEL, 0, (words - whole * PANEL) * sizeof(*panel));
            if (sizeof(T) == 2)  // the last input has a word to itself
                for (int64_t r = 0; r < rows; r++) memcpy(panel + whole * PANEL + r, w + (n + r) * K + K - 1, sizeof(T));
        }
        settle<T>(panel, words);
    }
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
template <> struct RowReader<f16> {
    static f16 at(const uint32_t *panel, int64_t r, int64_t k) {
        return ((const f16 *)(panel + k / 2 * PANEL))[k % 2 * PANEL + r];
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

#define MAX_RAY_LINEAR(NAME, T)                                                                                           \
    void linear_##NAME(const T *x, int64_t x_stride, int64_t M, int64_t K, const void *packed, int64_t N, const T *bias,  \
                       T *y, int threads) {                                                                               \
        linear<T>(x, x_stride, M, K, packed, N, bias, y, threads);                                                        \
    }                                                                                                                     \
    void pack_##NAME(const T *w, int64_t N, int64_t K, void *to, int threads) { pack<T>(w, N, K, to, threads); }          \
    void rows_##NAME(const void *packed, int64_t K, const int64_t *rows, int64_t count, T *y, int threads) {              \
        unpack_rows<T>(packed, K, rows, count, y, threads);                                                               \
    }

extern "C" {
MAX_RAY_LINEAR(f32, float)
MAX_RAY_LINEAR(bf16, bf16)
MAX_RAY_LINEAR(f16, f16)
}

// y = x W^T + b for bfloat16 on processors that multiply it (AVX-512 BF16): vdpbf16ps takes 16 outputs' pairs of weights
// as they are packed (panels.h) and one pair of inputs, and adds both products to 16 sums of float32. It rounds each of
// them to nearest even and takes subnormal numbers for zeros, whatever the processor's modes are.
//
// Every output is one chain of such additions in the order of k, whatever the number of rows: a row's result does not
// depend on its batch. (It differs in last bits from linear.cpp's, which adds the two products in the other order.)
//
// Nothing is widened, so one loop serves all numbers of rows: a thread takes groups of four panels from a common counter,
// goes through their inputs in chunks, and meets each chunk with all rows, block by block. The first block brings the
// weights from memory to the first cache, the last one begins to bring the next chunk's.
#include "dot2.h"
#include "kernels.h"
#include "panels.h"
#include "scratch.h"
#include <atomic>
#include <omp.h>
#include <utility>

#ifdef __AVX512BF16__
namespace {

constexpr int CHUNK = 128;  // inputs at once: four panels of them are 16 KiB; 256 and 512 were up to 15 % slower at 16 rows
constexpr int WORDS = CHUNK / 2 + ROW_PAD;  // of a row in a tile
constexpr int64_t ROW_BYTES = 4 << 20;  // of rows: they are read once a group and shall stay in cache
constexpr int LINES_AHEAD = 16;  // in a panel that is read once

// What a block brings nearer meanwhile: lines of each panel, one after another from `from` on, a part of a line a pair.
struct Ahead {
    const uint32_t *from[GROUP];
    int64_t first, step;  // in 256ths of a line
};

// sums [ROWS][64] += rows x weights of V panels, over `pairs` pairs of inputs.
template <int ROWS, int V>
void block(const uint32_t *const *panels, int64_t pairs, const Ahead &ahead, const uint32_t *x, float *sums) {
    const uint32_t *from[V];
    const uint32_t *later[V];
    for (int v = 0; v < V; v++) from[v] = panels[v], later[v] = ahead.from[v];
    int64_t line = ahead.first;
    const int64_t step = ahead.step;
    f32x16 acc[ROWS][V];
#pragma GCC unroll 32
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) acc[m][v] = *(f32x16 *)(sums + m * WIDTH + v * LANES);
    for (int64_t p = 0; p < pairs; p++) {
        u32x16 weights[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            weights[v] = *(const u32x16u *)(from[v] + p * PANEL);
            __builtin_prefetch(later[v] + (line >> 8) * PANEL);
        }
        line += step;
#pragma GCC unroll 32
        for (int m = 0; m < ROWS; m++) {
            const u32x16 inputs = splat_word(x[m * WORDS + p]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[m][v] = dot2(acc[m][v], weights[v], inputs);
        }
    }
#pragma GCC unroll 32
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) *(f32x16 *)(sums + m * WIDTH + v * LANES) = acc[m][v];
}

using Block = void (*)(const uint32_t *const *, int64_t, const Ahead &, const uint32_t *, float *);

template <int V, int... ROWS> Block block_of(int64_t rows, std::integer_sequence<int, ROWS...>) {
    static const Block table[] = {block<ROWS + 1, V>...};
    return table[rows - 1];
}

// V of `count` panels at a time for all rows; gives how many panels were taken. next: what follows this chunk of each.
template <int V>
int64_t passes(const uint32_t *const *panels, const uint32_t *const *next, int64_t count, int64_t pairs, const uint32_t *x,
               int64_t M, float *sums) {
    constexpr int MOST = V == 4 ? 6 : V == 2 ? 13 : 28;  // rows that V panels leave registers for
    const int64_t blocks = (M + MOST - 1) / MOST;
    int64_t v = 0;
    for (; v + V <= count; v += V) {
        Ahead ahead;
        for (int i = 0; i < V; i++) ahead.from[i] = blocks == 1 ? panels[v + i] : next[v + i];
        ahead.step = 256 / blocks;
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t from = M * b / blocks, rows = M * (b + 1) / blocks - from;
            ahead.first = blocks == 1 ? 256 * LINES_AHEAD : pairs * b * ahead.step;
            block_of<V>(rows, std::make_integer_sequence<int, MOST>())(panels + v, pairs, ahead, x + from * WORDS,
                                                                        sums + from * WIDTH + v * LANES);
        }
    }
    return v;
}

// A group of panels (the last one may have fewer) for all rows. later: the output at which this thread probably goes on.
void group(const uint32_t *packed, const uint32_t *tiles, int64_t M, int64_t K, int64_t N, int64_t n, int64_t later,
           const bf16 *bias, bf16 *y, float *sums) {
    const int64_t words = Packed<bf16>::panel_words(round_up(K, 2)), count = panels_left(N, n);
    memset(sums, 0, M * WIDTH * sizeof(float));
    for (int64_t k = 0, c = 0; k < K; k += CHUNK, c++) {
        const int64_t pairs = round_up(std::min<int64_t>(CHUNK, K - k), 2) / 2;
        const uint32_t *panels[GROUP], *next[GROUP];
        for (int64_t v = 0; v < count; v++) {
            panels[v] = packed + (n / PANEL + v) * words + Packed<bf16>::panel_words(k);
            next[v] = k + CHUNK < K || later + v * PANEL >= N ? panels[v] + pairs * PANEL : packed + (later / PANEL + v) * words;
        }
        const uint32_t *x = tiles + c * M * WORDS;
        int64_t v = passes<4>(panels, next, count, pairs, x, M, sums);
        v += passes<2>(panels + v, next + v, count - v, pairs, x, M, sums + v * LANES);
        passes<1>(panels + v, next + v, count - v, pairs, x, M, sums + v * LANES);
    }
    for (int64_t m = 0; m < M; m++)
        write_row(sums + m * WIDTH, bias ? bias + n : nullptr, y + m * N + n, std::min<int64_t>(WIDTH, N - n));
}

// Rows [M][K] in tiles [chunk][M][WORDS], with a zero past an odd K.
void tile_rows(const bf16 *x, int64_t stride, int64_t M, int64_t K, uint32_t *tiles, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && M * K > 1 << 17)
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0, c = 0; k < K; k += CHUNK, c++) {
            const int64_t count = std::min<int64_t>(CHUNK, K - k);
            bf16 *to = (bf16 *)(tiles + (c * M + m) * WORDS);
            memcpy(to, x + m * stride + k, count * sizeof(bf16));
            if (count % 2) to[count] = bf16{0};
        }
}

thread_local Scratch row_tiles, thread_sums;

void linear_some(const bf16 *x, int64_t x_stride, int64_t M, int64_t K, const uint32_t *packed, int64_t N, const bf16 *bias,
                 bf16 *y, int threads) {
    uint32_t *tiles = row_tiles.get<uint32_t>((K + CHUNK - 1) / CHUNK * M * WORDS);
    tile_rows(x, x_stride, M, K, tiles, threads);
    const int64_t groups = (N + WIDTH - 1) / WIDTH;
    if (M * K * N < 1 << 16) threads = 1;  // waking a second thread costs more
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *sums = thread_sums.get(M * WIDTH);
        for (int64_t at; (at = next++) < groups;) 
            group(packed, tiles, M, K, N, at * WIDTH, (at + threads) * WIDTH, bias, y, sums);
    }
}

}  // namespace
#endif

extern "C" {
// Whether this processor multiplies bfloat16; elsewhere linear_dot_bf16 is linear_bf16.
int has_bf16_products() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

void linear_dot_bf16(const bf16 *x, int64_t x_stride, int64_t M, int64_t K, const void *packed, int64_t N, const bf16 *bias,
                     bf16 *y, int threads) {
#ifdef __AVX512BF16__
    const int64_t fits = std::max<int64_t>(96, ROW_BYTES / 2 / K / 6 * 6);
    for (int64_t m = 0; m < M; m += fits)
        linear_some(x + m * x_stride, x_stride, std::min(fits, M - m), K, (const uint32_t *)packed, N, bias, y + m * N, threads);
#else
    linear_bf16(x, x_stride, M, K, packed, N, bias, y, threads);
#endif
}
}

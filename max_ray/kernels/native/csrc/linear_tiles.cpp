// y = x W^T + b for bfloat16 on processors with matrix registers (amx.h), from the weights as the other kernels have them
// (panels.h): 16 words of 16 pairs of a panel are a register as it stands.
//
// Every output is one chain of additions of 32 products each, in the order of k, whatever the number of rows: a row's
// result does not depend on its batch. (It differs in last bits from linear_dot.cpp's, which adds two products at a time.)
//
// Threads take groups of four panels from a common counter. Up to 16 rows read a group's weights once; more rows read them
// again from the second cache, two panels for 32 rows at a time.
#include "amx.h"
#include "kernels.h"
#include "panels.h"
#include "scratch.h"
#include <atomic>
#include <omp.h>

#ifdef MAX_RAY_AMX
namespace {

using amx::DEEP, amx::SIDE, amx::WORDS;

constexpr int64_t ROW_BYTES = 1 << 20;  // of rows: they are read once a group and shall stay in the second cache
constexpr int64_t AHEAD = 3;  // registers of a panel that are brought nearer while one is read; 6 and more were slower

// Rows in registers, [M / 16][K / 32][16][32] with zeros past K and past M; the only block of few rows has just those.
struct Rows {
    const bf16 *at;
    int64_t deep, side;  // numbers of a register, of a block of rows
    const bf16 *of(int64_t block, int64_t k) const { return at + block * side + k * deep; }
};

// Registers of panels: whole ones as they are packed, one more with zeros past K where K ends within one.
struct Panels {
    const uint32_t *at;
    int64_t words;         // of a panel
    const uint32_t *tail;  // [panels][16 pairs][16]; null: none
    int64_t whole, count;  // registers of a panel: whole ones, all
    int64_t next;          // words from a panel to the one that this thread probably reads after it
    const uint32_t *of(int64_t panel, int64_t k) const {
        return k < whole ? at + panel * words + k * WORDS : tail + panel * WORDS;
    }
    // Past the last weights, too: a prefetch of what is not there does nothing.
    const uint32_t *later(int64_t panel, int64_t k) const {
        return at + panel * words + (k < whole ? k * WORDS : next + (k - whole) * WORDS);
    }
    void bring(int64_t panel, int64_t k) const {
        const uint32_t *from = later(panel, k);
        for (int64_t i = 0; i < WORDS; i += LANES) __builtin_prefetch(from + i);
    }
};

// Registers of sums 0 .. 3, of rows 4 and 5, of weights 6 and 7; as amx::step, with weights that come from memory when the
// first rows meet them.
template <int M, int N, bool FIRST, int I>
inline void step(const Rows &rows, const Panels &panels, int64_t block, int64_t panel, int64_t k) {
    constexpr int m = I / N, n = I % N;
    if constexpr (n == 0) amx::load<4 + m % 2>(rows.of(block + m, k), DEEP * 2);
    if constexpr (m == 0) {
        amx::load<6 + n % 2>(panels.of(panel + n, k), SIDE * 4);
        if constexpr (FIRST) panels.bring(panel + n, k + AHEAD);
    }
    amx::add_product<I, 4 + m % 2, 6 + n % 2>();
}

// sums [M blocks of 16][64] of N panels.
template <int M, int N, bool FIRST, int... I>
inline void part(const Rows &rows, const Panels &panels, int64_t block, int64_t panel, float *sums,
                 std::integer_sequence<int, I...>) {
    (amx::zero<I>(), ...);
    for (int64_t k = 0; k < panels.count; k++) (step<M, N, FIRST, I>(rows, panels, block, panel, k), ...);
    (amx::store<I>(sums + (block + I / N) * SIDE * WIDTH + (panel + I % N) * LANES, WIDTH * 4), ...);
}

template <int M, int N> void part(const Rows &rows, const Panels &panels, int64_t block, int64_t panel, float *sums) {
    constexpr auto registers = std::make_integer_sequence<int, M * N>();
    if (block == 0)
        part<M, N, true>(rows, panels, block, panel, sums, registers);
    else
        part<M, N, false>(rows, panels, block, panel, sums, registers);
}

// sums [blocks of 16 rows][64] of up to four panels.
void group(const Rows &rows, const Panels &panels, int64_t blocks, int64_t count, float *sums) {
    int64_t block = 0;
    for (int64_t panel = 0; panel < count && blocks > 1; panel += 2)
        for (block = 0; block + 2 <= blocks; block += 2)
            if (panel + 2 <= count)
                part<2, 2>(rows, panels, block, panel, sums);
            else
                part<2, 1>(rows, panels, block, panel, sums);
    if (block == blocks) return;
    switch (count) {
    case 1:
        return part<1, 1>(rows, panels, block, 0, sums);
    case 2:
        return part<1, 2>(rows, panels, block, 0, sums);
    case 3:
        return part<1, 3>(rows, panels, block, 0, sums);
    case 4:
        return part<1, 4>(rows, panels, block, 0, sums);
    }
}

// What the matrix registers do, to the bit, in vector registers, for rows that are too few for them: a product's even and
// its odd inputs are added apart, from zero, then to each other, then to the sum. x: floats [K / 32][ROWS][32].
template <int ROWS, int V> void few_part(const float *x, const Panels &panels, int64_t panel, float *sums) {
    f32x16 total[ROWS][V] = {};
    for (int64_t k = 0; k < panels.count; k++, x += ROWS * DEEP) {
        const uint32_t *from[V], *later[V];
        for (int v = 0; v < V; v++) from[v] = panels.of(panel + v, k), later[v] = panels.later(panel + v, k + AHEAD);
        f32x16 even[ROWS][V] = {}, odd[ROWS][V] = {};
        for (int64_t p = 0; p < SIDE; p++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                const u32x16 pairs = *(const u32x16u *)(from[v] + p * LANES);
                __builtin_prefetch(later[v] + p * LANES);
#pragma GCC unroll 2
                for (int m = 0; m < ROWS; m++) {
                    even[m][v] += (f32x16)(pairs << 16) * x[m * DEEP + 2 * p];
                    odd[m][v] += (f32x16)(pairs & 0xffff0000u) * x[m * DEEP + 2 * p + 1];
                }
            }
        for (int m = 0; m < ROWS; m++)
            for (int v = 0; v < V; v++) total[m][v] += even[m][v] + odd[m][v];
    }
    for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < V; v++) *(f32x16 *)(sums + m * WIDTH + (panel + v) * LANES) = total[m][v];
}

template <int ROWS> void few_group(const float *x, const Panels &panels, int64_t count, float *sums) {
    int64_t panel = 0;
    for (; panel + 4 <= count; panel += 4) few_part<ROWS, 4>(x, panels, panel, sums);
    for (; panel < count; panel++) few_part<ROWS, 1>(x, panels, panel, sums);
}

// x [M][K] as Rows says, of `side` rows a block.
void arrange(const bf16 *x, int64_t stride, int64_t M, int64_t K, int64_t side, bf16 *to, int threads) {
    const int64_t registers = (K + DEEP - 1) / DEEP, padded = round_up(M, side);
#pragma omp parallel for num_threads(threads) if (threads > 1 && M * K > 1 << 17)
    for (int64_t m = 0; m < padded; m++)
        for (int64_t k = 0; k < registers; k++) {
            bf16 *row = to + ((m / side * registers + k) * side + m % side) * DEEP;
            const int64_t left = m < M ? std::min<int64_t>(DEEP, K - k * DEEP) : 0;
            if (left < DEEP) memset(row, 0, DEEP * sizeof(bf16));
            if (left) memcpy(row, x + m * stride + k * DEEP, left * sizeof(bf16));
        }
}

thread_local Scratch arranged_rows, widened_rows, thread_sums, thread_tail;

// The last pairs of each panel with zeros behind them; null where a panel has whole registers only.
const uint32_t *tail_of(const uint32_t *panels, int64_t words, int64_t count) {
    const int64_t left = words % WORDS;
    if (!left) return nullptr;
    uint32_t *tail = thread_tail.get<uint32_t>(GROUP * WORDS);
    for (int64_t v = 0; v < count; v++, panels += words) {
        memcpy(tail + v * WORDS, panels + words - left, left * 4);
        memset(tail + v * WORDS + left, 0, (WORDS - left) * 4);
    }
    return tail;
}

// The groups of panels that this thread gets: use(panels, how many, first output).
template <class Use>
void each_group(const uint32_t *packed, int64_t K, int64_t N, int threads, std::atomic<int64_t> &next, Use use) {
    const int64_t words = Packed<bf16>::panel_words(round_up(K, 2)), registers = (K + DEEP - 1) / DEEP;
    for (int64_t at; (at = next++) * WIDTH < N;) {
        const int64_t n = at * WIDTH, count = panels_left(N, n);
        const uint32_t *first = packed + n / PANEL * words;
        use(Panels{first, words, tail_of(first, words, count), words / WORDS, registers, threads * GROUP * words}, count, n);
    }
}

void write_rows(const float *sums, int64_t M, int64_t N, int64_t n, const bf16 *bias, bf16 *y) {
    for (int64_t m = 0; m < M; m++)
        write_row(sums + m * WIDTH, bias ? bias + n : nullptr, y + m * N + n, std::min<int64_t>(WIDTH, N - n));
}

// Threads for M rows: waking a second one costs more than little work.
int threads_for(int64_t M, int64_t K, int64_t N, int threads) { return M * K * N < 1 << 16 ? 1 : threads; }

template <int M>
void linear_few(const bf16 *x, int64_t x_stride, int64_t K, const uint32_t *packed, int64_t N, const bf16 *bias, bf16 *y,
                int threads) {
    float *wide = widened_rows.get(round_up(K, DEEP) * M);
    for (int64_t k = 0; k < round_up(K, DEEP); k++)
        for (int m = 0; m < M; m++) wide[(k / DEEP * M + m) * DEEP + k % DEEP] = k < K ? to_float(x[m * x_stride + k]) : 0;
    threads = threads_for(M, K, N, threads);
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *sums = thread_sums.get(M * WIDTH);
        each_group(packed, K, N, threads, next, [&](const Panels &panels, int64_t count, int64_t n) {
            {
                const amx::NoSubnormals as_registers_do;
                few_group<M>(wide, panels, count, sums);
            }
            write_rows(sums, M, N, n, bias, y);
        });
    }
}

void linear_some(const bf16 *x, int64_t x_stride, int64_t M, int64_t K, const uint32_t *packed, int64_t N, const bf16 *bias,
                 bf16 *y, int threads) {
    const int64_t side = std::min(M, SIDE), blocks = (M + side - 1) / side, registers = (K + DEEP - 1) / DEEP;
    bf16 *arranged = arranged_rows.get<bf16>(blocks * registers * side * DEEP);
    arrange(x, x_stride, M, K, side, arranged, threads);
    const Rows rows{arranged, side * DEEP, registers * side * DEEP};
    threads = threads_for(M, K, N, threads);
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const amx::InUse in_use(side);
        float *sums = thread_sums.get(blocks * SIDE * WIDTH);
        each_group(packed, K, N, threads, next, [&](const Panels &panels, int64_t count, int64_t n) {
            group(rows, panels, blocks, count, sums);
            write_rows(sums, M, N, n, bias, y);
        });
    }
}

}  // namespace
#endif

extern "C" {
// Whether this processor has matrix registers and the system lets this process use them; elsewhere linear_tiles_bf16 is
// linear_dot_bf16.
int has_bf16_tiles() {
#ifdef MAX_RAY_AMX
    return amx::allowed();
#else
    return 0;
#endif
}

void linear_tiles_bf16(const bf16 *x, int64_t x_stride, int64_t M, int64_t K, const void *packed, int64_t N,
                       const bf16 *bias, bf16 *y, int threads) {
#ifdef MAX_RAY_AMX
    const uint32_t *weights = (const uint32_t *)packed;
    if (M == 1) return linear_few<1>(x, x_stride, K, weights, N, bias, y, threads);
    if (M == 2) return linear_few<2>(x, x_stride, K, weights, N, bias, y, threads);
    const int64_t fits = std::max<int64_t>(6 * SIDE, ROW_BYTES / 2 / K / (2 * SIDE) * (2 * SIDE));
    for (int64_t m = 0; m < M; m += fits)
        linear_some(x + m * x_stride, x_stride, std::min(fits, M - m), K, weights, N, bias, y + m * N, threads);
#else
    linear_dot_bf16(x, x_stride, M, K, packed, N, bias, y, threads);
#endif
}
}

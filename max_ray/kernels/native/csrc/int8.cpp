// y = x W^T with a quantized W and x rounded to 8 bits, from the tiles that max_ray/kernels/quantized.py describes.
//
// Each row of x is cut into groups of 32 columns; a group becomes 32 signed bytes with one scale, largest magnitude / 127.
// Products within a group are exact integers (AVX-512 VNNI's vpdpbusd: 4 columns of 16 outputs at once); a group of a tile
// then adds to the 16 sums
//
//     dot * (scale * x_scale) - offset * (x_scale * sum of the bytes)
//
// where Q6_K and Q8_0 have no offset: the middle of their codes is taken off in integers, before. The groups come in the
// order of K, whatever the number of rows: a row's result depends neither on its batch nor on the number of threads.
#include "scratch.h"
#include "tiles.h"
#include <atomic>
#include <utility>

namespace {

constexpr int BLOCK = 12;  // rows at once: 12 sums, 8 lines of codes, 2 scales and 4 products fit the registers
constexpr int TURNS = 4;  // rows whose products take turns
constexpr int64_t PIECE_BYTES = 1 << 22;  // of codes that a thread takes at once, at most: a core may be taken away for a while.
                                          // Not few: it streams from five places, which take a while to begin with
constexpr int64_t CACHED_BYTES = 1 << 16;  // where several blocks of rows read them, one after another
constexpr int PREFETCH = 1024;  // bytes ahead in a tile's codes

// A group of a row of x. word i: columns 4i .. 4i + 3. total: scale * sum of the bytes; minus: that sum of each half, negated.
struct Record {
    int32_t words[8];
    float scale, total;
    int32_t minus[2];
};

#ifdef __AVX512VNNI__
// Spelled out: the compiler would broadcast the word in an instruction of its own.
static inline i32x16 dot4(i32x16 sums, u32x16 codes, const int32_t &bytes) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codes), "m"(bytes));
    return sums;
}
#else
static inline i32x16 dot4(i32x16 sums, u32x16 codes, const int32_t &bytes) {
    for (int b = 0; b < 4; b++) sums += (i32x16)((codes >> (8 * b)) & 255u) * splat_int(int8_t(bytes >> (8 * b)));
    return sums;
}
#endif

// Products of lines FROM .. TO - 1 with ROWS rows, onto dots [ROWS]. The rows' chains are independent and take turns.
template <int FROM, int TO, int ROWS> static inline void dot(const u32x16 *lines, const Record *x, i32x16 *dots) {
#pragma GCC unroll 8
    for (int i = FROM; i < TO; i++)
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) dots[m] = dot4(dots[m], lines[i], x[m].words[i]);
}

// Lines 0..3 are columns 0..15, lines 4..7 the others.
static inline void load_nibbles(const uint8_t *codes, u32x16 *lines) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const u32x16 both = words(codes + i * 64);
        __builtin_prefetch(codes + i * 64 + PREFETCH);
        lines[i] = both & 0x0f0f0f0fu;
        lines[4 + i] = (both >> 4) & 0x0f0f0f0fu;
    }
}

struct Affine {
    u32x16 lines[8];
    f32x16 scale, offset;
    template <int ROWS> inline void add(const Record *x, f32x16 *sums) const {
        i32x16 dots[ROWS] = {};
        dot<0, 8, ROWS>(lines, x, dots);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) {
            sums[m] = number(dots[m]) * (scale * x[m].scale) + sums[m];
            sums[m] = sums[m] - offset * x[m].total;
        }
    }
};

// Each kind: `load` reads group g of tile t.
struct Q4K {
    const uint8_t *codes, *scales, *mins;
    const uint16_t *super_scales, *super_mins;
    inline Affine load(int64_t t, int64_t g, int64_t groups) const {
        const int64_t at = t * groups + g;
        Affine group;
        load_nibbles(codes + at * NIBBLE_BYTES, group.lines);
        group.scale = load_bytes(scales + at * LANES) * load_halves(super_scales + at / 8 * LANES);
        group.offset = load_bytes(mins + at * LANES) * load_halves(super_mins + at / 8 * LANES);
        return group;
    }
};

// Bit i of a byte of a high line: the fifth bit of that byte of line i.
struct Q5K {
    Q4K low;
    const uint8_t *high;
    inline Affine load(int64_t t, int64_t g, int64_t groups) const {
        Affine group = low.load(t, g, groups);
        const uint8_t *at = high + (t * groups + g) * BIT_BYTES;
        const u32x16 bits = words(at);
        __builtin_prefetch(at + PREFETCH / 4);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) group.lines[i] |= (i < 4 ? bits << (4 - i) : bits >> (i - 4)) & 0x10101010u;
        return group;
    }
};

// Scales of groups of `size` columns; zeros of the same groups, or a single one.
struct Q4 {
    const uint8_t *codes;
    const uint16_t *scales;
    const uint8_t *zeros;
    int64_t size, single_zero;
    inline Affine load(int64_t t, int64_t g, int64_t groups) const {
        const int64_t scale_at = t * (groups * GROUP_COLUMNS / size) + g * GROUP_COLUMNS / size;
        Affine group;
        load_nibbles(codes + (t * groups + g) * NIBBLE_BYTES, group.lines);
        group.scale = load_halves(scales + scale_at * LANES);
        group.offset = group.scale * (single_zero ? splat(float(*zeros)) : load_bytes(zeros + scale_at * LANES));
        return group;
    }
};

struct Q41 {
    const uint8_t *codes;
    const uint16_t *scales, *mins;
    inline Affine load(int64_t t, int64_t g, int64_t groups) const {
        const int64_t at = t * groups + g;
        Affine group;
        load_nibbles(codes + at * NIBBLE_BYTES, group.lines);
        group.scale = load_halves(scales + at * LANES);
        group.offset = -load_halves(mins + at * LANES);
        return group;
    }
};

struct Q6K {
    const uint8_t *codes, *high;
    const int8_t *scales;
    const uint16_t *super_scales;
    struct Group {
        u32x16 lines[8];
        f32x16 scale[2];
        template <int ROWS> inline void add(const Record *x, f32x16 *sums) const {
            half<0, ROWS>(x, sums);
            half<1, ROWS>(x, sums);
        }
        template <int H, int ROWS> inline void half(const Record *x, f32x16 *sums) const {
            i32x16 dots[ROWS];
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++) dots[m] = splat_int(x[m].minus[H]) << 5;
            dot<4 * H, 4 * H + 4, ROWS>(lines, x, dots);
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++) sums[m] = number(dots[m]) * (scale[H] * x[m].scale) + sums[m];
        }
    };
    inline Group load(int64_t t, int64_t g, int64_t groups) const {
        const int64_t at = t * groups + g;
        Group group;
        load_nibbles(codes + at * NIBBLE_BYTES, group.lines);
        // bits 0-1 of byte b of high line h: column 8h + b; 2-3: 16 + 8h + b; 4-5 and 6-7: those + 4
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            const u32x16 pairs = words(high + at * PAIR_BYTES + h * 64);
            __builtin_prefetch(high + at * PAIR_BYTES + h * 64 + PREFETCH / 2);
            group.lines[2 * h] |= (pairs << 4) & 0x30303030u;
            group.lines[4 + 2 * h] |= (pairs << 2) & 0x30303030u;
            group.lines[2 * h + 1] |= pairs & 0x30303030u;
            group.lines[4 + 2 * h + 1] |= (pairs >> 2) & 0x30303030u;
        }
        const f32x16 whole = load_halves(super_scales + at / 8 * LANES);
        group.scale[0] = load_signed_bytes(scales + at * 2 * LANES) * whole;
        group.scale[1] = load_signed_bytes(scales + (at * 2 + 1) * LANES) * whole;
        return group;
    }
};

struct Q8 {
    const uint8_t *codes;
    const uint16_t *scales;
    struct Group {
        u32x16 lines[8];
        f32x16 scale;
        template <int ROWS> inline void add(const Record *x, f32x16 *sums) const {
            i32x16 dots[ROWS];
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++) dots[m] = splat_int((x[m].minus[0] + x[m].minus[1]) * 128);
            dot<0, 8, ROWS>(lines, x, dots);
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++) sums[m] = number(dots[m]) * (scale * x[m].scale) + sums[m];
        }
    };
    inline Group load(int64_t t, int64_t g, int64_t groups) const {
        const int64_t at = t * groups + g;
        Group group;
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            group.lines[i] = words(codes + at * WHOLE_BYTES + i * 64) ^ 0x80808080u;  // signed codes as 0..255
            __builtin_prefetch(codes + at * WHOLE_BYTES + i * 64 + PREFETCH);
        }
        group.scale = load_halves(scales + at * LANES);
        return group;
    }
};

// The 16 outputs of tile t for ROWS rows: records [groups][ROWS] -> sums.
template <class W, int ROWS>
void block(const W &weight, int64_t t, int64_t groups, const Record *records, f32x16 *sums) {
    f32x16 acc[ROWS];
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) acc[m] = f32x16{};
    for (int64_t g = 0; g < groups; g++) {
        const auto group = weight.load(t, g, groups);
#pragma GCC unroll 4
        for (int m = 0; m + TURNS <= ROWS; m += TURNS) group.template add<TURNS>(records + g * ROWS + m, acc + m);
        if constexpr (ROWS % TURNS != 0) {
            constexpr int rest = ROWS % TURNS;
            group.template add<rest>(records + g * ROWS + ROWS - rest, acc + ROWS - rest);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) sums[m] = acc[m];
}

template <class W> using Block = void (*)(const W &, int64_t, int64_t, const Record *, f32x16 *);
template <class W, int... ROWS> Block<W> block_of(int64_t rows, std::integer_sequence<int, ROWS...>) {
    static const Block<W> table[] = {block<W, ROWS + 1>...};
    return table[rows - 1];
}

template <class V, class F> static inline auto folded(V v, F join) {
    const i32x16 by8 = {8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7};
    const i32x16 by4 = {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11};
    const i32x16 by2 = {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13};
    const i32x16 by1 = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
    v = join(v, __builtin_shuffle(v, by8));
    v = join(v, __builtin_shuffle(v, by4));
    v = join(v, __builtin_shuffle(v, by2));
    v = join(v, __builtin_shuffle(v, by1));
    return v[0];
}

// To the nearest, ties to even; the product is not rounded before.
static inline i32x16 nearest(f32x16 x, float times) {
    const f32x16 shifted = x * times + 12582912.0f;  // 1.5 * 2^23: the integer ends up in the low bits
    return (i32x16)shifted - splat_int(0x4b400000);
}

// 32 columns as a record. A group whose largest magnitude is below 1e-30 counts as zeros; one with a NaN has the scale NaN.
template <class T> static inline void round_group(const T *x, Record &to) {
    const f32x16 half[2] = {load16(x), load16(x + LANES)};
    const i32x16 bits[2] = {(i32x16)half[0] & 0x7fffffff, (i32x16)half[1] & 0x7fffffff};  // in the order of magnitudes
    const auto larger = [](i32x16 a, i32x16 b) { return a > b ? a : b; };
    const int32_t top_bits = folded(larger(bits[0], bits[1]), larger);
    float top;
    memcpy(&top, &top_bits, sizeof(top));
    const float times = top > 1e-30f ? 127.0f / top : 0.0f;
    for (int h = 0; h < 2; h++) {
        const i32x16 codes = nearest(half[h], times);
        store_signed_bytes((int8_t *)(to.words + 4 * h), codes);
        to.minus[h] = -folded(codes, [](i32x16 a, i32x16 b) { return a + b; });
    }
    to.scale = top / 127.0f;
    to.total = to.scale * float(-to.minus[0] - to.minus[1]);
}

struct Blocks {
    int64_t rows, count;
    explicit Blocks(int64_t rows) : rows(rows), count((rows + BLOCK - 1) / BLOCK) {}
    int64_t first(int64_t b) const { return rows * b / count; }
    int64_t size(int64_t b) const { return first(b + 1) - first(b); }
};

// Rows of x as records [block][group][row of the block].
template <class T>
void round_rows(const T *x, int64_t K, const Blocks &blocks, Record *records, int threads) {
    const int64_t groups = K / GROUP_COLUMNS;
#pragma omp parallel for num_threads(threads) if (threads > 1 && blocks.rows * K > 1 << 15)
    for (int64_t b = 0; b < blocks.count; b++) {
        const int64_t from = blocks.first(b), rows = blocks.size(b);
        for (int64_t m = 0; m < rows; m++)
            for (int64_t g = 0; g < groups; g++)
                round_group(x + (from + m) * K + g * GROUP_COLUMNS, records[from * groups + g * rows + m]);
    }
}

thread_local Scratch row_records;

// The next tiles, first .. stop - 1: a thread's share of what is left, so that all end together; false when none is left.
static inline bool take(std::atomic<int64_t> &next, int64_t &first, int64_t &stop, int64_t tiles, int64_t most, int threads) {
    first = next.load();
    do {
        if (first >= tiles) return false;
        stop = first + std::max<int64_t>(1, std::min(most, (tiles - first) / threads));
    } while (!next.compare_exchange_weak(first, stop));
    return true;
}

template <class W, class T>
void multiply(const W &weight, const T *x, int64_t M, int64_t K, int64_t N, T *y, int64_t y_stride, int threads) {
    if (M == 0) return;
    const int64_t groups = K / GROUP_COLUMNS, tiles = (N + LANES - 1) / LANES;
    const Blocks blocks(M);
    const int64_t most = (blocks.count > 1 ? CACHED_BYTES : PIECE_BYTES) / (groups * NIBBLE_BYTES);
    Record *records = row_records.get<Record>(M * groups);
    round_rows(x, K, blocks, records, threads);
    if (M * K * N < 1 << 16) threads = 1;  // waking a second thread costs more
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t first = 0, stop; take(next, first, stop, tiles, most, threads); first = stop)
        for (int64_t b = 0; b < blocks.count; b++) {
            const int64_t from = blocks.first(b), rows = blocks.size(b);
            const auto run = block_of<W>(rows, std::make_integer_sequence<int, BLOCK>());
            for (int64_t t = first; t < stop; t++) {
                f32x16 sums[BLOCK];
                run(weight, t, groups, records + from * groups, sums);
                for (int64_t m = 0; m < rows; m++)
                    store_outputs(y + (from + m) * y_stride + t * LANES, sums[m], N - t * LANES);
            }
        }
}

}  // namespace

#define MAX_RAY_INT8(NAME, T)                                                                                             \
    void q4k_int8_##NAME(const QuantizedMatrix *w, const T *x, int64_t M, int64_t K, int64_t N, T *y, int64_t y_stride,   \
                         int threads) {                                                                                   \
        const Q4K weight{w->codes, w->scales, w->mins, w->super_scales, w->super_mins};                                   \
        multiply(weight, x, M, K, N, y, y_stride, threads);                                                               \
    }                                                                                                                     \
    void q5k_int8_##NAME(const QuantizedMatrix *w, const T *x, int64_t M, int64_t K, int64_t N, T *y, int64_t y_stride,   \
                         int threads) {                                                                                   \
        const Q5K weight{{w->codes, w->scales, w->mins, w->super_scales, w->super_mins}, w->high_codes};                  \
        multiply(weight, x, M, K, N, y, y_stride, threads);                                                               \
    }                                                                                                                     \
    void q6k_int8_##NAME(const QuantizedMatrix *w, const T *x, int64_t M, int64_t K, int64_t N, T *y, int64_t y_stride,   \
                         int threads) {                                                                                   \
        const Q6K weight{w->codes, w->high_codes, (const int8_t *)w->scales, w->super_scales};                            \
        multiply(weight, x, M, K, N, y, y_stride, threads);                                                               \
    }                                                                                                                     \
    void q8_int8_##NAME(const QuantizedMatrix *w, const T *x, int64_t M, int64_t K, int64_t N, T *y, int64_t y_stride,    \
                        int threads) {                                                                                    \
        multiply(Q8{w->codes, w->super_scales}, x, M, K, N, y, y_stride, threads);                                        \
    }                                                                                                                     \
    void q4_int8_##NAME(const QuantizedMatrix *w, const T *x, int64_t M, int64_t K, int64_t N, T *y, int64_t y_stride,    \
                        int threads) {                                                                                    \
        const Q4 weight{w->codes, w->super_scales, w->mins, w->group_size, w->single_zero};                               \
        multiply(weight, x, M, K, N, y, y_stride, threads);                                                               \
    }                                                                                                                     \
    void q41_int8_##NAME(const QuantizedMatrix *w, const T *x, int64_t M, int64_t K, int64_t N, T *y, int64_t y_stride,   \
                         int threads) {                                                                                   \
        multiply(Q41{w->codes, w->super_scales, w->super_mins}, x, M, K, N, y, y_stride, threads);                        \
    }

extern "C" {
MAX_RAY_INT8(f32, float)
MAX_RAY_INT8(bf16, bf16)
MAX_RAY_INT8(f16, f16)

// Whether this processor multiplies bytes; elsewhere these kernels are right and slow.
int has_int8_products() {
#ifdef __AVX512VNNI__
    return 1;
#else
    return 0;
#endif
}
}

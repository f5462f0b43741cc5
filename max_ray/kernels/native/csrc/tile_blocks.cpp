// GGUF's quantized blocks into the tiles of max_ray/kernels/quantized.py, while a file is read. Blocks: weights/gguf_blocks.py.
//
// A row is a run of blocks. Row r of a tile fills lane r: words of 4 columns, 16 words apart. Padding lanes stay as they are.
#include "kernels.h"
#include <algorithm>
#include <type_traits>

namespace {

constexpr int WORDS_1 = 16, WORDS_2 = 32, WORDS_4 = 64, WORDS_8 = 128;  // of a group in a tile, by the bits of a code
constexpr uint32_t LOW = 0x0f0f0f0fu, PAIR = 0x03030303u, ONE = 0x01010101u;

struct Tiles {
    uint32_t *codes, *high_codes;
    uint8_t *scales, *mins;
    uint16_t *super_scales, *super_mins;
};

static inline uint32_t word(const uint8_t *p) {
    uint32_t w;
    memcpy(&w, p, 4);
    return w;
}
static inline uint16_t half(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return h;
}

// 32 bytes with a code in each low nibble, once shifted: words 0..3 low, words 4..7 high.
static inline void put_nibbles(uint32_t *line, const uint8_t *bytes, int shift) {
    for (int i = 0; i < 4; i++)
        line[i * LANES] = ((word(bytes + 4 * i) >> shift) & LOW) | ((word(bytes + 16 + 4 * i) >> shift) & LOW) << 4;
}

// Each kind: BYTES and COLUMNS of a block; `put` writes block b of the row in lane r. The only scales of Q4_0 and Q8_0 stand in
// super_scales.
struct Q4_0 {
    static constexpr int BYTES = 18, COLUMNS = 32;
    static void put(const Tiles &to, const uint8_t *block, int64_t b, int r) {
        to.super_scales[b * LANES + r] = half(block);
        for (int i = 0; i < 4; i++) to.codes[b * WORDS_4 + i * LANES + r] = word(block + 2 + 4 * i);
    }
};

struct Q8_0 {
    static constexpr int BYTES = 34, COLUMNS = 32;
    static void put(const Tiles &to, const uint8_t *block, int64_t b, int r) {
        to.super_scales[b * LANES + r] = half(block);
        for (int i = 0; i < 8; i++) to.codes[b * WORDS_8 + i * LANES + r] = word(block + 2 + 4 * i);
    }
};

// What Q4_K and Q5_K have in common; `nibbles` are in the block.
static inline void put_with_minima(const Tiles &to, const uint8_t *block, const uint8_t *nibbles, int64_t b, int r) {
    to.super_scales[b * LANES + r] = half(block);
    to.super_mins[b * LANES + r] = half(block + 2);
    const uint8_t *low = block + 4, *middle = block + 8, *high = block + 12;
    for (int j = 0; j < 8; j++) {
        const int k = j % 4;
        const int64_t at = (b * 8 + j) * LANES + r;
        to.scales[at] = j < 4 ? low[k] & 63 : (high[k] & 15) | low[k] >> 6 << 4;
        to.mins[at] = j < 4 ? middle[k] & 63 : high[k] >> 4 | middle[k] >> 6 << 4;
        put_nibbles(to.codes + (b * 8 + j) * WORDS_4 + r, nibbles + j / 2 * 32, j % 2 * 4);
    }
}

struct Q4_K {
    static constexpr int BYTES = 144, COLUMNS = 256;
    static void put(const Tiles &to, const uint8_t *block, int64_t b, int r) {
        put_with_minima(to, block, block + 16, b, r);
    }
};

struct Q5_K {
    static constexpr int BYTES = 176, COLUMNS = 256;
    static void put(const Tiles &to, const uint8_t *block, int64_t b, int r) {
        put_with_minima(to, block, block + 48, b, r);
        for (int j = 0; j < 8; j++) {
            uint32_t bits = 0;
            for (int i = 0; i < 8; i++) bits |= ((word(block + 16 + 4 * i) >> j) & ONE) << i;
            to.high_codes[(b * 8 + j) * WORDS_1 + r] = bits;
        }
    }
};

struct Q6_K {
    static constexpr int BYTES = 210, COLUMNS = 256;
    static void put(const Tiles &to, const uint8_t *block, int64_t b, int r) {
        to.super_scales[b * LANES + r] = half(block + 208);
        for (int s = 0; s < 16; s++) to.scales[(b * 16 + s) * LANES + r] = block[192 + s];
        for (int j = 0; j < 8; j++) {
            const int quarter = j % 4;
            put_nibbles(to.codes + (b * 8 + j) * WORDS_4 + r, block + j / 4 * 64 + quarter % 2 * 32, quarter / 2 * 4);
            const uint8_t *pairs = block + 128 + j / 4 * 32;
            const auto bits = [&](int i) { return (word(pairs + 4 * i) >> (2 * quarter)) & PAIR; };
            uint32_t *line = to.high_codes + (b * 8 + j) * WORDS_2 + r;
            for (int h = 0; h < 2; h++)
                line[h * LANES] = bits(2 * h) | bits(4 + 2 * h) << 2 | bits(2 * h + 1) << 4 | bits(5 + 2 * h) << 6;
        }
    }
};

template <class KIND>
void tile(const uint8_t *blocks, int64_t rows, int64_t row_blocks, int64_t first_tile, const QuantizedMatrix *m, int threads) {
    const int64_t groups = row_blocks * KIND::COLUMNS / 32, supers = row_blocks;
    constexpr bool is_k = KIND::COLUMNS == 256;
    const int code_words = std::is_same_v<KIND, Q8_0> ? WORDS_8 : WORDS_4;
    const int scales = std::is_same_v<KIND, Q6_K> ? 2 * LANES : LANES;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < (rows + LANES - 1) / LANES; t++) {
        const int64_t at = (first_tile + t) * groups, super_at = (first_tile + t) * supers * LANES;
        Tiles to{};
        to.codes = (uint32_t *)m->codes + at * code_words;
        to.super_scales = (uint16_t *)m->super_scales + super_at;
        if (is_k) to.scales = (uint8_t *)m->scales + at * scales;
        if (std::is_same_v<KIND, Q5_K>) to.high_codes = (uint32_t *)m->high_codes + at * WORDS_1;
        if (std::is_same_v<KIND, Q6_K>) to.high_codes = (uint32_t *)m->high_codes + at * WORDS_2;
        if (std::is_same_v<KIND, Q4_K> || std::is_same_v<KIND, Q5_K>) {
            to.mins = (uint8_t *)m->mins + at * LANES;
            to.super_mins = (uint16_t *)m->super_mins + super_at;
        }
        const int lanes = int(std::min<int64_t>(LANES, rows - t * LANES));
        for (int64_t b = 0; b < row_blocks; b++)
            for (int r = 0; r < lanes; r++)
                KIND::put(to, blocks + ((t * LANES + r) * row_blocks + b) * KIND::BYTES, b, r);
    }
}

}  // namespace

#define MAX_RAY_TILE(NAME, KIND)                                                                                          \
    void tile_##NAME(const uint8_t *blocks, int64_t rows, int64_t row_blocks, int64_t first_tile,                         \
                     const QuantizedMatrix *to, int threads) {                                                            \
        tile<KIND>(blocks, rows, row_blocks, first_tile, to, threads);                                                    \
    }

// blocks [rows][row_blocks] -> tiles first_tile, first_tile + 1, ... of the matrix `to`.
extern "C" {
MAX_RAY_TILE(q4_0, Q4_0)
MAX_RAY_TILE(q8_0, Q8_0)
MAX_RAY_TILE(q4_k, Q4_K)
MAX_RAY_TILE(q5_k, Q5_K)
MAX_RAY_TILE(q6_k, Q6_K)
}

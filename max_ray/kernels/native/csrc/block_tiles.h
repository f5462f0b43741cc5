// What the kinds of GGUF blocks share on their way into the tiles of max_ray/kernels/quantized.py.
//
// A row is a run of blocks. Row r of a tile fills lane r: words of 4 columns, 16 words apart. Padding lanes stay as they are.
// Each kind of block: BYTES and COLUMNS of a block; `Target`, the kind of tiles; `put` writes block b of the row in lane r.
#pragma once
#include "kernels.h"
#include <algorithm>

namespace block_tiles {

constexpr int WORDS_1 = 16, WORDS_2 = 32, WORDS_4 = 64, WORDS_8 = 128;  // of a group in a tile, by the bits of a code
constexpr uint32_t LOW = 0x0f0f0f0fu, PAIR = 0x03030303u, ONE = 0x01010101u;

struct Tiles {
    uint32_t *codes, *high_codes;
    uint8_t *scales, *mins;
    uint16_t *super_scales, *super_mins;
};

// Each kind of tiles: words of codes, words of high codes, scales and mins in bytes of a group of 32 columns of 16 rows;
// columns that share a super-scale, and whether there are super-mins. The only scales of ToQ4, ToQ4_1 and ToQ8, and the only
// mins of ToQ4_1, stand in super_scales and super_mins.
struct ToQ4 {
    static constexpr int CODES = WORDS_4, HIGH = 0, SCALES = 0, MINS = 0, SUPER = 32;
    static constexpr bool SUPER_MINS = false;
};
struct ToQ4_1 : ToQ4 {
    static constexpr bool SUPER_MINS = true;
};
struct ToQ8 {
    static constexpr int CODES = WORDS_8, HIGH = 0, SCALES = 0, MINS = 0, SUPER = 32;
    static constexpr bool SUPER_MINS = false;
};
struct ToQ4K {
    static constexpr int CODES = WORDS_4, HIGH = 0, SCALES = LANES, MINS = LANES, SUPER = 256;
    static constexpr bool SUPER_MINS = true;
};
struct ToQ5K {
    static constexpr int CODES = WORDS_4, HIGH = WORDS_1, SCALES = LANES, MINS = LANES, SUPER = 256;
    static constexpr bool SUPER_MINS = true;
};
struct ToQ6K {
    static constexpr int CODES = WORDS_4, HIGH = WORDS_2, SCALES = 2 * LANES, MINS = 0, SUPER = 256;
    static constexpr bool SUPER_MINS = false;
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

// The high codes of a group, 2 bits each; bits(i): those of columns 4i .. 4i + 3, a byte each.
template <class BITS> static inline void put_pairs(uint32_t *line, BITS bits) {
    for (int h = 0; h < 2; h++)
        line[h * LANES] = bits(2 * h) | bits(4 + 2 * h) << 2 | bits(2 * h + 1) << 4 | bits(5 + 2 * h) << 6;
}

// The tiles of tile `t` of the matrix. groups: of 32 columns in a row.
template <class TARGET> static inline Tiles tiles_at(const QuantizedMatrix *m, int64_t t, int64_t groups) {
    const int64_t at = t * groups, super_at = at * 32 / TARGET::SUPER * LANES;
    Tiles to{};
    to.codes = (uint32_t *)m->codes + at * TARGET::CODES;
    to.super_scales = (uint16_t *)m->super_scales + super_at;
    if (TARGET::HIGH) to.high_codes = (uint32_t *)m->high_codes + at * TARGET::HIGH;
    if (TARGET::SCALES) to.scales = (uint8_t *)m->scales + at * TARGET::SCALES;
    if (TARGET::MINS) to.mins = (uint8_t *)m->mins + at * TARGET::MINS;
    if (TARGET::SUPER_MINS) to.super_mins = (uint16_t *)m->super_mins + super_at;
    return to;
}

// Whether none of these halves is infinite or NaN.
static inline bool are_finite(const uint16_t *halves, int64_t count) {
    uint16_t largest = 0;
    for (int64_t i = 0; i < count; i++) largest = std::max<uint16_t>(largest, halves[i] & 0x7fff);
    return largest < 0x7c00;
}

// Gives whether all scales were finite.
template <class KIND>
bool tile(const uint8_t *blocks, int64_t rows, int64_t row_blocks, int64_t first_tile, const QuantizedMatrix *m) {
    using Target = typename KIND::Target;
    const int64_t groups = row_blocks * KIND::COLUMNS / 32, supers = groups * 32 / Target::SUPER * LANES;
    bool finite = true;
    for (int64_t t = 0; t < (rows + LANES - 1) / LANES; t++) {
        const Tiles to = tiles_at<Target>(m, first_tile + t, groups);
        const int lanes = int(std::min<int64_t>(LANES, rows - t * LANES));
        for (int64_t b = 0; b < row_blocks; b++)
            for (int r = 0; r < lanes; r++)
                KIND::put(to, blocks + ((t * LANES + r) * row_blocks + b) * KIND::BYTES, b, r);
        finite &= are_finite(to.super_scales, supers) && (!Target::SUPER_MINS || are_finite(to.super_mins, supers));
    }
    return finite;
}

}  // namespace block_tiles

// blocks [rows][row_blocks] -> tiles first_tile, first_tile + 1, ... of the matrix `to`. Gives whether all scales were finite.
#define MAX_RAY_TILE(NAME, KIND)                                                                                          \
    extern "C" int tile_##NAME(const uint8_t *blocks, int64_t rows, int64_t row_blocks, int64_t first_tile,               \
                               const QuantizedMatrix *to) {                                                               \
        return block_tiles::tile<KIND>(blocks, rows, row_blocks, first_tile, to);                                         \
    }

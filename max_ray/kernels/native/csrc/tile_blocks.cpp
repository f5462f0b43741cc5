// GGUF's quantized blocks that have a kind of tiles of their own, while a file is read. Blocks: weights/gguf_blocks.py.
#include "block_tiles.h"

namespace {

using namespace block_tiles;

// 32 bytes with a code in each low nibble, once shifted: words 0..3 low, words 4..7 high.
static inline void put_nibbles(uint32_t *line, const uint8_t *bytes, int shift) {
    for (int i = 0; i < 4; i++)
        line[i * LANES] = ((word(bytes + 4 * i) >> shift) & LOW) | ((word(bytes + 16 + 4 * i) >> shift) & LOW) << 4;
}

struct Q4_0 {
    static constexpr int BYTES = 18, COLUMNS = 32;
    using Target = ToQ4;
    static void put(const Tiles &to, const uint8_t *block, int64_t b, int r) {
        to.super_scales[b * LANES + r] = half(block);
        for (int i = 0; i < 4; i++) to.codes[b * WORDS_4 + i * LANES + r] = word(block + 2 + 4 * i);
    }
};

struct Q4_1 {
    static constexpr int BYTES = 20, COLUMNS = 32;
    using Target = ToQ4_1;
    static void put(const Tiles &to, const uint8_t *block, int64_t b, int r) {
        to.super_scales[b * LANES + r] = half(block);
        to.super_mins[b * LANES + r] = half(block + 2);
        for (int i = 0; i < 4; i++) to.codes[b * WORDS_4 + i * LANES + r] = word(block + 4 + 4 * i);
    }
};

struct Q8_0 {
    static constexpr int BYTES = 34, COLUMNS = 32;
    using Target = ToQ8;
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
    using Target = ToQ4K;
    static void put(const Tiles &to, const uint8_t *block, int64_t b, int r) {
        put_with_minima(to, block, block + 16, b, r);
    }
};

struct Q5_K {
    static constexpr int BYTES = 176, COLUMNS = 256;
    using Target = ToQ5K;
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
    using Target = ToQ6K;
    static void put(const Tiles &to, const uint8_t *block, int64_t b, int r) {
        to.super_scales[b * LANES + r] = half(block + 208);
        for (int s = 0; s < 16; s++) to.scales[(b * 16 + s) * LANES + r] = block[192 + s];
        for (int j = 0; j < 8; j++) {
            const int quarter = j % 4;
            put_nibbles(to.codes + (b * 8 + j) * WORDS_4 + r, block + j / 4 * 64 + quarter % 2 * 32, quarter / 2 * 4);
            const uint8_t *pairs = block + 128 + j / 4 * 32;
            put_pairs(to.high_codes + (b * 8 + j) * WORDS_2 + r,
                      [&](int i) { return (word(pairs + 4 * i) >> (2 * quarter)) & PAIR; });
        }
    }
};

}  // namespace

MAX_RAY_TILE(q4_0, Q4_0)
MAX_RAY_TILE(q4_1, Q4_1)
MAX_RAY_TILE(q8_0, Q8_0)
MAX_RAY_TILE(q4_k, Q4_K)
MAX_RAY_TILE(q5_k, Q5_K)
MAX_RAY_TILE(q6_k, Q6_K)

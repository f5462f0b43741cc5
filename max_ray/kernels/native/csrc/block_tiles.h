// What the kinds of GGUF blocks share on their way into the tiles of max_ray/kernels/quantized.py.
//
// A row is a run of blocks. Row r of a tile fills lane r: words of 4 columns, 16 words apart. Padding lanes stay as they are.
// Each kind of block: BYTES and COLUMNS of a block; `Target`, the kind of tiles; `put` writes block b of the row in lane r.
#pragma once
#include "kernels.h"
#include <algorithm>
#include <cerrno>
#include <fcntl.h>
#include <unistd.h>

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

// Row r of the matrix among the rows that are stored: in a head of `size` rows two halves take turns in the file, and stand one
// below the other here. size 1: no head is reordered.
static inline int64_t stored_row(int64_t r, int64_t size) {
    if (size == 1) return r;
    const int64_t half = size / 2, in_head = r % size;
    return r - in_head + in_head % half * 2 + in_head / half;
}

// Gives whether all scales were finite. head: see `stored_row`.
template <class KIND>
bool tile(const uint8_t *blocks, int64_t rows, int64_t row_blocks, int64_t first_tile, const QuantizedMatrix *m,
          int64_t head = 1) {
    using Target = typename KIND::Target;
    const int64_t groups = row_blocks * KIND::COLUMNS / 32, supers = groups * 32 / Target::SUPER * LANES;
    bool finite = true;
    for (int64_t t = 0; t < (rows + LANES - 1) / LANES; t++) {
        const Tiles to = tiles_at<Target>(m, first_tile + t, groups);
        const int lanes = int(std::min<int64_t>(LANES, rows - t * LANES));
        const uint8_t *row[LANES];
        for (int r = 0; r < lanes; r++) row[r] = blocks + stored_row(t * LANES + r, head) * row_blocks * KIND::BYTES;
        for (int64_t b = 0; b < row_blocks; b++)
            for (int r = 0; r < lanes; r++) KIND::put(to, row[r] + b * KIND::BYTES, b, r);
        finite &= are_finite(to.super_scales, supers) && (!Target::SUPER_MINS || are_finite(to.super_mins, supers));
    }
    return finite;
}

enum Outcome { NOT_FINITE = 0, FINE = 1, ENDED = 2 };  // or -errno

// `size` bytes of the file from `offset` on.
static inline int read_fully(int file, uint8_t *to, int64_t size, int64_t offset) {
    while (size) {
        const ssize_t count = pread(file, to, size, offset);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return count ? -errno : ENDED;
        to += count, size -= count, offset += count;
    }
    return FINE;
}

// Rows of blocks from a file, as many at a time as the buffer holds: they stay in the cache. A chunk is whole tiles, and heads.
template <class KIND>
int tile_rows(int file, int64_t offset, int64_t rows, int64_t row_blocks, int64_t head, uint8_t *buffer, int64_t buffer_bytes,
              int64_t first_tile, const QuantizedMatrix *m) {
    const int64_t row_bytes = row_blocks * KIND::BYTES;
    int64_t unit = LANES;
    while (unit % head) unit += LANES;
    const int64_t step = std::max(unit, buffer_bytes / row_bytes / unit * unit);
    bool finite = true;
#ifdef POSIX_FADV_WILLNEED
    posix_fadvise(file, offset, rows * row_bytes, POSIX_FADV_WILLNEED);
#endif
    for (int64_t r = 0; r < rows; r += step) {
        const int64_t count = std::min(step, rows - r);
        const int outcome = read_fully(file, buffer, count * row_bytes, offset + r * row_bytes);
        if (outcome != FINE) return outcome;
        finite &= tile<KIND>(buffer, count, row_blocks, first_tile + r / LANES, m, head);
    }
    return finite ? FINE : NOT_FINITE;
}

template <class KIND>
int tile_file(const char *path, int64_t offset, int64_t rows, int64_t row_blocks, int64_t head, uint8_t *buffer,
              int64_t buffer_bytes, int64_t first_tile, const QuantizedMatrix *m) {
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return -errno;
    const int outcome = tile_rows<KIND>(file, offset, rows, row_blocks, head, buffer, buffer_bytes, first_tile, m);
    close(file);
    return outcome;
}

}  // namespace block_tiles

// blocks [rows][row_blocks] -> tiles first_tile, first_tile + 1, ... of the matrix `to`. Gives whether all scales were finite.
// tile_file_...: the same from a file at `offset`; the buffer holds 16 rows, and a head, at least. Gives an Outcome.
#define MAX_RAY_TILE(NAME, KIND)                                                                                          \
    extern "C" int tile_##NAME(const uint8_t *blocks, int64_t rows, int64_t row_blocks, int64_t first_tile,               \
                               const QuantizedMatrix *to) {                                                               \
        return block_tiles::tile<KIND>(blocks, rows, row_blocks, first_tile, to);                                         \
    }                                                                                                                     \
    extern "C" int tile_file_##NAME(const char *path, int64_t offset, int64_t rows, int64_t row_blocks, int64_t head,     \
                                    uint8_t *buffer, int64_t buffer_bytes, int64_t first_tile,                            \
                                    const QuantizedMatrix *to) {                                                          \
        return block_tiles::tile_file<KIND>(path, offset, rows, row_blocks, head, buffer, buffer_bytes, first_tile, to);  \
    }

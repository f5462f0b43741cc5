// Attention over latents of bf16 with the processor's matrix registers (amx.h): the three passes of latent.cpp.
//
// Scores are made as K Q^T, so that keys are read as they lie in the cache and the maxima of 16 queries are one vector;
// y is made as W_uv attended^T for the same reason. What stands on the right of a product is laid out in registers of
// words first: W_uk and the values as pairs of neighbouring rows, queries and attended latents turned.
//
// Queries through W_uk, exp(scores) and attended latents are rounded to bf16. Every sum has one order: its registers along
// the sum from the first to the last, always as many for a given shape, with zeros where there is no number.
#pragma once
#include "amx.h"
#include "attention.h"
#include "latent.h"

#ifdef MAX_RAY_AMX
namespace {

constexpr int64_t KEYS = TILE, KEY_DEPTH = KEYS / amx::DEEP;

inline int64_t blocks_of(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// Two rows as words: `even` in the low halves. One register further every 16 columns, `step` words.
inline void join_rows(const bf16 *even, const bf16 *odd, int64_t columns, int64_t step, uint32_t *to) {
    for (int64_t c = 0; c < columns; c += LANES, to += step) {
        const u32x16 low = even ? (u32x16)load_upto(even + c, columns - c) >> 16 : u32x16{};
        const u32x16 high = odd ? (u32x16)load_upto(odd + c, columns - c) : u32x16{};
        *(u32x16u *)to = low | high;
    }
}

// Rows `at(0)` .. `at(15)` of D numbers, a multiple of 16, as columns of words: registers [D / 32].
template <class At> inline void turn_rows(At at, int64_t D, uint32_t *to) {
    for (int64_t d = 0; d < D; d += amx::DEEP, to += amx::WORDS) {
        f32x16 square[LANES];
        for (int i = 0; i < LANES; i++)
            square[i] = load_pairs(at(i) + d, D - d);
        transpose16(square, (float *)to, LANES);
    }
}

// What a piece of attention needs: [block of 16 queries] of everything but keys and values.
struct TileBuffers {
    uint32_t *queries, *values;  // registers [block][D / 32]; [L / 16][64 / 32]
    bf16 *keys, *weights;        // [64][D up to a multiple of 32], where the cache's cannot be read; [block][16][64]
    float *scores, *out;         // [block][64][16]; registers [block][L / 16]
    float *top, *total;          // [block][16]
    int32_t *seen;               // [block][16]: how many keys of the row
    void fit(Scratch &memory, int64_t blocks, int64_t depth, int64_t width) {
        const int64_t lanes = blocks * LANES;
        const int64_t sizes[] = {blocks * depth * amx::WORDS, width * KEY_DEPTH * amx::WORDS, KEYS * depth * amx::SIDE,
                                 lanes * KEYS / 2, lanes * KEYS, blocks * width * amx::WORDS, lanes, lanes, lanes};
        int64_t all = 0;
        for (int64_t size : sizes) all += size;
        uint32_t *at = memory.get<uint32_t>(all), *of[9];
        for (int i = 0; i < 9; i++) of[i] = at, at += sizes[i];
        queries = of[0], values = of[1], keys = (bf16 *)of[2], weights = (bf16 *)of[3], scores = (float *)of[4];
        out = (float *)of[5], top = (float *)of[6], total = (float *)of[7], seen = (int32_t *)of[8];
    }
};

// 16 queries' scores [64][16] of the keys from `at` on become weights [16][64]. Their outputs so far, registers
// [width], and sums are scaled to the new maxima.
inline void soften_block(float *scores, f32x16 scale, i32x16 seen, float *top, float *total, bf16 *weights, float *out,
                         int64_t width) {
    const f32x16 old_top = load16(top);
    f32x16 new_top = old_top;
    for (int j = 0; j < KEYS; j++) {
        f32x16 x = load16(scores + j * LANES) * scale;
        x = splat_int(j) < seen ? x : splat(LOWEST);
        store16(scores + j * LANES, x);
        new_top = vmax(new_top, x);
    }
    f32x16 even = {}, odd = {};
    for (int j = 0; j < KEYS; j += amx::DEEP) {
        f32x16 words[LANES];
        for (int i = 0; i < LANES; i++) {
            const float *from = scores + (j + 2 * i) * LANES;
            const f32x16 first = vexp(load16(from) - new_top), second = vexp(load16(from + LANES) - new_top);
            even += first, odd += second;
            words[i] = (f32x16)(bf16_bits(first) | bf16_bits(second) << 16);
        }
        transpose16(words, (float *)(weights + j), KEYS / 2);
    }
    const f32x16 kept = vexp(old_top - new_top);
    store16(total, load16(total) * kept + (even + odd));
    store16(top, new_top);
    for (int i = 0; i < LANES; i++) {
        const float keep = kept[i];
        if (keep == 1.0f) continue;
        for (int64_t l = 0; l < width; l++) {
            float *row = out + l * amx::WORDS + i * LANES;
            store16(row, load16(row) * keep);
        }
    }
}

thread_local Scratch tile_queries, tile_attended, tile_memory, tile_weights;

struct TiledLatents {
    static constexpr int64_t HEAD_TOKENS = 128;      // of a piece of a product with a head's weights
    static constexpr int64_t FEW_HEADS = amx::SIDE;  // fewer in a piece leave columns empty
    using Thread = amx::InUse;

    const LatentInputs<bf16> &in;
    const LatentShape &s;
    const int64_t D, depth, width, wide;  // of a latent, in registers of 32; L in registers of 16, and as a row of attended
    const AttentionShape attention;
    bf16 *const queries, *const attended;  // [token][head][D], [token][head][wide]

    TiledLatents(const LatentInputs<bf16> &in, int64_t tokens)
        : in(in), s(in.s), D(in.latent_width()), depth(blocks_of(D, amx::DEEP)), width(blocks_of(s.L, amx::SIDE)),
          wide(round_up(s.L, amx::DEEP)), attention{s.B, s.H, 1, D, s.page_size, s.table_width, 0, s.scale, 0},
          queries(tile_queries.get<bf16>(tokens * s.H * D)), attended(tile_attended.get<bf16>(tokens * s.H * wide)) {}

    bf16 *absorbed(int64_t base, int64_t token, int64_t head) const { return queries + ((token - base) * s.H + head) * D; }
    bf16 *latents(int64_t base, int64_t token, int64_t head) const { return attended + ((token - base) * s.H + head) * wide; }

    // Tokens [first, first + count) of one head, through W_uk.
    void absorb(int64_t base, int64_t head, int64_t first, int64_t count) const {
        const int64_t inner = blocks_of(s.P, amx::DEEP), deep = inner * amx::DEEP, blocks = blocks_of(count, amx::SIDE);
        uint32_t *weights = tile_weights.get<uint32_t>(width * inner * amx::WORDS);
        const bf16 *up = in.key_weights(head);
        for (int64_t p = 0; p < deep; p += 2)
            join_rows(p < s.P ? up + p * s.L : nullptr, p + 1 < s.P ? up + (p + 1) * s.L : nullptr, s.L,
                      inner * amx::WORDS, weights + p / amx::DEEP * amx::WORDS + p % amx::DEEP / 2 * amx::SIDE);
        bf16 *rows = tile_memory.get<bf16>(blocks * amx::SIDE * deep + 4 * amx::WORDS * 2);
        float *sums = (float *)(rows + blocks * amx::SIDE * deep);
        memset(rows, 0, blocks * amx::SIDE * deep * sizeof(bf16));
        for (int64_t i = 0; i < count; i++) memcpy(rows + i * deep, in.query(first + i, head), s.P * sizeof(bf16));
        const amx::Operand a{rows, deep * 2, amx::DEEP * 2, amx::SIDE * deep * 2};
        const amx::Operand b{weights, amx::SIDE * 4, amx::BYTES, inner * amx::BYTES};
        amx::each_part(blocks, width, [&](int64_t m, int64_t rows, int64_t n, int64_t columns) {
            amx::product(rows, columns, a.from(m), b.from(n), inner, {sums, columns * amx::WORDS, amx::WORDS}, false);
            for (int64_t i = m * amx::SIDE; i < std::min((m + rows) * amx::SIDE, count); i++) {
                const float *from = sums + (i / amx::SIDE - m) * columns * amx::WORDS + i % amx::SIDE * LANES;
                bf16 *to = absorbed(base, first + i, head);
                for (int64_t c = n; c < n + columns; c++, from += amx::WORDS)
                    store_outputs(to + c * LANES, load16(from), s.L - c * LANES);
            }
        });
        for (int64_t i = 0; i < count; i++)
            memcpy(absorbed(base, first + i, head) + s.L, in.query(first + i, head) + s.P, s.R * sizeof(bf16));
    }

    void attend(int64_t base, const Piece &piece) const {
        const int64_t count = piece.count * piece.heads, blocks = blocks_of(count, LANES);
        TileBuffers b;
        b.fit(tile_memory, blocks, depth, width);
        const int64_t first_seen = in.lengths[piece.row] + piece.first_token - in.indptr[piece.row];
        begin(base, piece, first_seen, blocks, b);
        const int64_t stop = first_seen + piece.count;
        const int32_t *table = in.tables + piece.row * s.table_width;
        Tile<bf16> tiles[2];
        tiles[0].find(in.cache, in.cache, table, 0, stop, 0, attention);
        for (int64_t at = 0, turn = 0; at < stop; at += KEYS, turn ^= 1) {
            Tile<bf16> &next = tiles[turn ^ 1];
            next.count = 0;
            if (at + KEYS < stop) next.find(in.cache, in.cache, table, at + KEYS, stop, 0, attention);
            const int64_t unseeing = std::max<int64_t>(0, at - first_seen) * piece.heads / LANES;
            attend_tile(tiles[turn], next, at, unseeing, blocks, b);
        }
        for (int64_t i = 0; i < count; i++) {
            const f32x16 scale = splat(1.0f / b.total[i]);
            const float *from = b.out + i / LANES * width * amx::WORDS + i % LANES * LANES;
            bf16 *to = latents(base, piece.first_token + i / piece.heads, piece.first_head + i % piece.heads);
            for (int64_t l = 0; l < width; l++) store16(to + l * LANES, load16(from + l * amx::WORDS) * scale);
            if (wide > width * LANES) store16(to + width * LANES, f32x16{});
        }
    }

    // Queries of a piece, 16 a block; the last block's empty places hold the last query again.
    void begin(int64_t base, const Piece &piece, int64_t first_seen, int64_t blocks, TileBuffers &b) const {
        const int64_t last = piece.count * piece.heads - 1;
        for (int64_t block = 0; block < blocks; block++)
            turn_rows(
                [&](int64_t i) {
                    i = std::min(block * LANES + i, last);
                    return absorbed(base, piece.first_token + i / piece.heads, piece.first_head + i % piece.heads);
                },
                D, b.queries + block * depth * amx::WORDS);
        for (int64_t i = 0; i < blocks * LANES; i++) {
            b.seen[i] = first_seen + std::min(i, last) / piece.heads + 1;
            b.top[i] = LOWEST, b.total[i] = 0;
        }
    }

    // Blocks from `unseeing` on attend to a tile, whose first key is at position `at`.
    void attend_tile(const Tile<bf16> &tile, const Tile<bf16> &next, int64_t at, int64_t unseeing, int64_t blocks,
                     TileBuffers &b) const {
        const amx::Operand keys = keys_of(tile, b.keys);
        lay_out_values(tile, next, b.values);
        const amx::Operand queries{b.queries, amx::SIDE * 4, amx::BYTES, depth * amx::BYTES};
        const int64_t key_blocks = blocks_of(tile.count, amx::SIDE);
        amx::each_part(key_blocks, blocks - unseeing, [&](int64_t m, int64_t rows, int64_t n, int64_t columns) {
            n += unseeing;
            const amx::Result scores{b.scores + n * KEYS * LANES + m * amx::WORDS, amx::WORDS, KEYS * LANES};
            amx::product(rows, columns, keys.from(m), queries.from(n), depth, scores, false);
        });
        for (int64_t i = unseeing * LANES; i < blocks * LANES; i += LANES)
            soften_block(b.scores + i * KEYS, splat(s.scale), *(const i32x16 *)(b.seen + i) - int32_t(at), b.top + i,
                         b.total + i, b.weights + i * KEYS, b.out + i * width * LANES, at ? width : 0);
        const amx::Operand weights{b.weights, KEYS * 2, amx::DEEP * 2, amx::SIDE * KEYS * 2};
        const amx::Operand values{b.values, amx::SIDE * 4, amx::BYTES, KEY_DEPTH * amx::BYTES};
        amx::each_part(blocks - unseeing, width, [&](int64_t m, int64_t rows, int64_t n, int64_t columns) {
            m += unseeing;
            const amx::Result out{b.out + (m * width + n) * amx::WORDS, width * amx::WORDS, amx::WORDS};
            amx::product(rows, columns, weights.from(m), values.from(n), KEY_DEPTH, out, at > 0);
        });
    }

    // The keys where they lie, if that is in one piece; else copied. (Rows past the last key hold anything.)
    amx::Operand keys_of(const Tile<bf16> &tile, bf16 *copies) const {
        bool together = tile.count == KEYS && D % amx::DEEP == 0;
        for (int64_t j = 1; together && j < KEYS; j++) together = tile.keys[j] == tile.keys[j - 1] + D;
        if (together) return {tile.keys[0], D * 2, amx::DEEP * 2, amx::SIDE * D * 2};
        const int64_t row = depth * amx::DEEP;
        for (int64_t j = 0; j < tile.count; j++) {
            memcpy(copies + j * row, tile.keys[j], D * sizeof(bf16));
            memset(copies + j * row + D, 0, (row - D) * sizeof(bf16));
        }
        return {copies, row * 2, amx::DEEP * 2, amx::SIDE * row * 2};
    }

    // Registers [L / 16][2], zeros where there is no key; meanwhile the next tile comes nearer.
    void lay_out_values(const Tile<bf16> &tile, const Tile<bf16> &next, uint32_t *to) const {
        for (int64_t j = 0; j < KEYS; j += 2) {
            join_rows(j < tile.count ? tile.values[j] : nullptr, j + 1 < tile.count ? tile.values[j + 1] : nullptr,
                      width * LANES, KEY_DEPTH * amx::WORDS, to + j / amx::DEEP * amx::WORDS + j % amx::DEEP / 2 * LANES);
            for (int64_t i = j; i < std::min(j + 2, next.count); i++) prefetch(next.keys[i], D);
        }
    }

    // Tokens [first, first + count) of one head, through W_uv.
    void expand(int64_t base, int64_t head, int64_t first, int64_t count) const {
        const int64_t blocks = blocks_of(count, amx::SIDE), depth = wide / amx::DEEP, outputs = blocks_of(s.V, amx::SIDE);
        uint32_t *turned = tile_memory.get<uint32_t>((blocks * depth + 4) * amx::WORDS);
        float *sums = (float *)(turned + blocks * depth * amx::WORDS);
        for (int64_t block = 0; block < blocks; block++)
            turn_rows([&](int64_t i) { return latents(base, first + std::min(block * amx::SIDE + i, count - 1), head); },
                      wide, turned + block * depth * amx::WORDS);
        const amx::Operand a = value_weights(head);
        const amx::Operand b{turned, amx::SIDE * 4, amx::BYTES, depth * amx::BYTES};
        amx::each_part(outputs, blocks, [&](int64_t m, int64_t rows, int64_t n, int64_t columns) {
            amx::product(rows, columns, a.from(m), b.from(n), depth, {sums, columns * amx::WORDS, amx::WORDS}, false);
            for (int64_t part = 0; part < rows * columns; part++) {
                const int64_t v = (m + part / columns) * amx::SIDE, token = (n + part % columns) * amx::SIDE;
                f32x16 square[LANES];
                for (int i = 0; i < LANES; i++) square[i] = load16(sums + part * amx::WORDS + i * LANES);
                float by_token[amx::WORDS];
                transpose16(square, by_token, LANES);
                for (int64_t i = 0; i < std::min(amx::SIDE, count - token); i++)
                    store_outputs(in.result(first + token + i, head) + v, load16(by_token + i * LANES), s.V - v);
            }
        });
    }

    // W_uv where it lies, if it fills whole registers; else copied.
    amx::Operand value_weights(int64_t head) const {
        const bf16 *from = in.value_weights(head);
        if (wide == s.L && s.V % amx::SIDE == 0) return {from, s.L * 2, amx::DEEP * 2, amx::SIDE * s.L * 2};
        bf16 *rows = tile_weights.get<bf16>(round_up(s.V, amx::SIDE) * wide);
        memset(rows, 0, round_up(s.V, amx::SIDE) * wide * sizeof(bf16));
        for (int64_t v = 0; v < s.V; v++) memcpy(rows + v * wide, from + v * s.L, s.L * sizeof(bf16));
        return {rows, wide * 2, amx::DEEP * 2, amx::SIDE * wide * 2};
    }
};

}  // namespace
#endif

// Attention of bfloat16 by matrix registers (amx.h), where the processor has them.
//
// A register of scores is turned: 16 keys, as they stand in the cache, times 16 queries. They are turned back for the
// softmax; the weights, rounded to bf16, and pairs of values make the other product. A score is one chain of additions of
// 32 products each, and so is an output: the same for a decode row as for a prompt.
#pragma once
#include "amx.h"
#include "attention.h"
#ifdef MAX_RAY_AMX

namespace {

class Registers {
    static constexpr int64_t GROUPS = TILE / amx::SIDE;  // of 16 keys in a tile
    static constexpr int64_t FEW = 4;                    // queries of a block that are gathered, not turned
    static constexpr int64_t FEWEST = 2;                 // queries whose values are added by vector registers

    const amx::InUse in_use;
    Scratch &memory;
    int64_t D = 0, deep = 0, queries = 0, blocks = 0;  // deep: D up to whole registers; blocks of 16 queries
    bf16 *rows, *keys, *weights;                       // queries [blocks * 16][deep], keys [64][deep], [blocks * 16][64]
    uint32_t *q, *values;                              // [blocks][deep / 32][16 pairs][16 queries], [32 pairs][D]
    float *out, *scores, *top, *total, *turned;        // [blocks * 16][D], [blocks * 16][64], [..], [..], [64][16]

    void fit() {
        const int64_t padded = blocks * amx::SIDE;
        const int64_t sizes[] = {padded * deep / 2, TILE * deep / 2, padded * TILE / 2,
                                 padded * deep / 2, TILE / 2 * D,    padded * D,
                                 padded * TILE,     padded,          padded,
                                 TILE * amx::SIDE};
        int64_t all = 0;
        for (int64_t n : sizes) all += round_up(n, LANES);
        float *at = memory.get(all);
        void *to[] = {&rows, &keys, &weights, &q, &values, &out, &scores, &top, &total, &turned};
        for (int i = 0; i < 10; i++) *(float **)to[i] = at, at += round_up(sizes[i], LANES);
        memset(out, 0, queries * D * sizeof(float));  // past the last query there is what nothing reads
    }

    // Keys of a tile as groups of 16 rows: in the cache where few queries read them and 16 lie in one block of it.
    int64_t find_keys(const Tile<bf16> &tile, const AttentionShape &s, const bf16 **groups) {
        const bool in_place = blocks == 1 && D == deep && s.page_size % amx::SIDE == 0;
        if (!in_place)
            for (int64_t j = 0; j < tile.count; j++) {
                memcpy(keys + j * deep, tile.keys[j], D * sizeof(bf16));
                if (D < deep) memset(keys + j * deep + D, 0, (deep - D) * sizeof(bf16));
            }
        for (int64_t j = 0; j < tile.count; j += amx::SIDE)
            groups[j / amx::SIDE] = in_place ? tile.keys[j] : keys + j * deep;
        return in_place ? s.KVH * D : deep;
    }

    // turned [16 N keys][16 queries] of one block of queries. row: numbers from one key to the next.
    template <int... I>
    void score(const bf16 *const *groups, int64_t row, const uint32_t *block, std::integer_sequence<int, I...>) {
        (amx::zero<I>(), ...);
        for (int64_t d = 0; d < deep; d += amx::DEEP, block += amx::WORDS) {
            amx::load<6>(block, amx::SIDE * 4);
            ((amx::load<4 + I % 2>(groups[I] + d, row * 2), amx::add_product<I, 4 + I % 2, 6>()), ...);
        }
        (amx::store<I>(turned + I * amx::WORDS, amx::SIDE * 4), ...);
    }
    template <int N> void score(const bf16 *const *groups, int64_t row, const uint32_t *block) {
        score(groups, row, block, std::make_integer_sequence<int, N>());
    }

    // turned, of `count` keys, as rows of scores of `left` queries.
    void turn_back(int64_t count, int64_t left, float *to) const {
        const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int64_t j = 0; j < count; j += amx::SIDE) {
            const float *from = turned + j * amx::SIDE;
            if (left > FEW) {
                f32x16 square[LANES];
                for (int i = 0; i < LANES; i++) square[i] = load16(from + i * LANES);
                transpose16(square, to + j, TILE);
            } else {
                for (int64_t i = 0; i < left; i++)
                    store16(to + i * TILE + j, (f32x16)_mm512_i32gather_ps((__m512i)(lane * LANES), from + i, 4));
            }
        }
    }

    // out [16][16 N] of a block += weights [16][32 steps] x values, from column d on.
    template <int... I>
    void add_values(const bf16 *weights, int64_t steps, int64_t d, float *out, std::integer_sequence<int, I...>) const {
        (amx::load<I>(out + I * LANES, D * 4), ...);
        for (int64_t k = 0; k < steps; k++) {
            amx::load<4>(weights + k * amx::DEEP, TILE * 2);
            ((amx::load<6 + I % 2>(values + k * amx::SIDE * D + d + I * LANES, D * 4), amx::add_product<I, 4, 6 + I % 2>()),
             ...);
        }
        (amx::store<I>(out + I * LANES, D * 4), ...);
    }
    template <int N> void add_values(const bf16 *weights, int64_t steps, int64_t d, float *out) const {
        add_values(weights, steps, d, out + d, std::make_integer_sequence<int, N>());
    }

    // The same of Q queries in vector registers, to the bit: values of even and of odd keys are added apart, from zero, then
    // to each other, then to the sum. Few queries are not worth the pairs.
    template <int Q, int V> void add_few(const Tile<bf16> &tile, int64_t d) {
        f32x16 sums[Q][V];
        for (int i = 0; i < Q; i++)
            for (int v = 0; v < V; v++) sums[i][v] = load16(out + i * D + d + v * LANES);
        for (int64_t first = 0; first < tile.count; first += amx::DEEP) {
            f32x16 apart[2][Q][V] = {};
            const int64_t stop = std::min<int64_t>(tile.count, first + amx::DEEP);
            for (int64_t j = first; j < stop; j += 2)
#pragma GCC unroll 2
                for (int odd = 0; odd < 2; odd++) {
                    if (j + odd == stop) break;
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++) {
                        const f32x16 value = load16(tile.values[j + odd] + d + v * LANES);
#pragma GCC unroll 2
                        for (int i = 0; i < Q; i++) apart[odd][i][v] += value * to_float(weights[i * TILE + j + odd]);
                    }
                }
            for (int i = 0; i < Q; i++)
                for (int v = 0; v < V; v++) sums[i][v] += apart[0][i][v] + apart[1][i][v];
        }
        for (int i = 0; i < Q; i++)
            for (int v = 0; v < V; v++) store16(out + i * D + d + v * LANES, sums[i][v]);
    }
    template <int Q> void add_few(const Tile<bf16> &tile) {
        const amx::NoSubnormals as_registers_do;
        int64_t d = 0;
        for (; d + 4 * LANES <= D; d += 4 * LANES) add_few<Q, 4>(tile, d);
        for (; d + 2 * LANES <= D; d += 2 * LANES) add_few<Q, 2>(tile, d);
        for (; d < D; d += LANES) add_few<Q, 1>(tile, d);
    }

    // Values in pairs, zeros up to whole registers; meanwhile the next tile comes nearer.
    void join_values(const Tile<bf16> &tile, const Tile<bf16> &next) {
        const int64_t pairs = (tile.count + 1) / 2;
        for (int64_t p = 0; p < pairs; p++) {
            join(tile, 2 * p, D, values + p * D);
            bring(next, 2 * p, 2 * p + 2);
        }
        memset(values + pairs * D, 0, (round_up(pairs, amx::SIDE) - pairs) * D * sizeof(uint32_t));
        bring(next, 2 * pairs, next.count);
    }
    void bring(const Tile<bf16> &next, int64_t from, int64_t to) const {
        for (int64_t j = from; j < std::min(to, next.count); j++) prefetch(next.keys[j], D), prefetch(next.values[j], D);
    }

    // Weights of a block's queries out of their scores.
    void weigh(int64_t block, int64_t at, int64_t first_seen, int64_t group, const AttentionShape &s) {
        for (int64_t i = block * amx::SIDE; i < std::min(queries, (block + 1) * amx::SIDE); i++) {
            const int64_t position = first_seen + i / group;
            const int64_t from = s.window ? std::max<int64_t>(0, position + 1 - s.window - at) : 0;
            const int64_t to = std::min<int64_t>(TILE, position + 1 - at);
            if (from < to)
                soften(scores + i * TILE, from, to, s, top + i, total + i, out + i * D, D);
            else
                memset(scores + i * TILE, 0, TILE * sizeof(float));
            weight_words(scores + i * TILE, (uint32_t *)(weights + i * TILE));
        }
    }

  public:
    explicit Registers(Scratch &memory) : memory(memory) {}

    void begin(int64_t num_queries, int64_t width) {
        D = width, deep = round_up(width, amx::DEEP), queries = num_queries;
        blocks = (queries + amx::SIDE - 1) / amx::SIDE;
        fit();
    }

    void take(int64_t query, const bf16 *from, float sink) {
        memcpy(rows + query * deep, from, D * sizeof(bf16));
        memset(rows + query * deep + D, 0, (deep - D) * sizeof(bf16));
        top[query] = sink, total[query] = sink == LOWEST ? 0 : 1;
    }

    // All queries are taken.
    void settle() {
        if (queries <= FEW) {
            const uint32_t *words = (const uint32_t *)rows;
            for (int64_t i = 0; i < queries; i++)
                for (int64_t w = 0; w < deep / 2; w++) q[w * LANES + i] = words[i * (deep / 2) + w];
            return;
        }
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t d = 0; d < deep; d += amx::DEEP) {
                f32x16 square[LANES];
                for (int i = 0; i < LANES; i++)
                    square[i] = load16((const float *)(rows + (block * amx::SIDE + i) * deep + d));
                transpose16(square, (float *)q + block * deep / 2 * LANES + d / 2 * LANES, LANES);
            }
    }

    void attend(const Tile<bf16> &tile, const Tile<bf16> &next, int64_t at, int64_t first_seen, int64_t group,
                const AttentionShape &s) {
        const bf16 *groups[GROUPS];
        const int64_t row = find_keys(tile, s, groups), steps = (tile.count + amx::DEEP - 1) / amx::DEEP;
        const bool is_fewest = queries <= FEWEST;
        if (is_fewest)
            bring(next, 0, next.count);
        else
            join_values(tile, next);
        // queries before the tile see nothing of it
        const int64_t first = std::max<int64_t>(0, at - first_seen) * group / amx::SIDE;
        for (int64_t block = first; block < blocks; block++) {
            const uint32_t *block_q = q + block * deep / 2 * LANES;
            switch ((tile.count + amx::SIDE - 1) / amx::SIDE) {
            case 1:
                score<1>(groups, row, block_q);
                break;
            case 2:
                score<2>(groups, row, block_q);
                break;
            case 3:
                score<3>(groups, row, block_q);
                break;
            case 4:
                score<4>(groups, row, block_q);
                break;
            }
            turn_back(tile.count, queries - block * amx::SIDE, scores + block * amx::SIDE * TILE);
            weigh(block, at, first_seen, group, s);
            if (is_fewest) {
                if (queries == 1)
                    add_few<1>(tile);
                else
                    add_few<2>(tile);
                return;
            }
            const bf16 *block_weights = weights + block * amx::SIDE * TILE;
            float *block_out = out + block * amx::SIDE * D;
            int64_t d = 0;
            for (; d + 4 * LANES <= D; d += 4 * LANES) add_values<4>(block_weights, steps, d, block_out);
            for (; d < D; d += LANES) add_values<1>(block_weights, steps, d, block_out);
        }
    }

    const float *result(int64_t query) const { return out + query * D; }
    float sum_of_weights(int64_t query) const { return total[query]; }
};

}  // namespace
#endif

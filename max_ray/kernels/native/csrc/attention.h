// What the kernels of attention share: keys and values of a tile of 64, and the queries that attend to it. See attention.cpp.
#pragma once
#include "dot2.h"
#include "kernels.h"
#include "scratch.h"
#include <cmath>
#include <limits>

namespace {

constexpr int TILE = 64;  // keys
constexpr int BLOCK = 6;  // queries at once: 6 x 4 accumulators
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// The products' words. of: how many numbers a word holds. load: 16 words of a head from d on; what is past its end is 0.
struct Floats {
    typedef float Word;
    static constexpr int of = 1;
    template <class T> static inline f32x16 load(const T *head, int64_t, int64_t d) { return load16(head + d); }
    static inline f32x16 add(f32x16 sums, const float *b, float a) { return load16(b) * a + sums; }
};

// Memory of one thread, kept between calls. q [queries][D], keys [D][64], values [64][D], weights [queries][64] in words;
// out [queries][D], scores [queries][64], top and total [queries] in floats. Values and out may be narrower: [.][V].
template <class Words> struct Buffers {
    typedef typename Words::Word Word;
    Scratch memory;
    Word *q, *keys, *values, *weights;
    float *out, *scores, *top, *total;
    void fit(int64_t queries, int64_t D, int64_t V) {
        constexpr int of = Words::of;
        const int64_t deep = round_up(D / of, LANES);  // keys are turned in squares of 16
        const int64_t sizes[] = {queries * D / of, deep * TILE,    TILE / of * V, queries * TILE / of,
                                 queries * V,      queries * TILE, queries,       queries};
        int64_t all = 0;
        for (int64_t n : sizes) all += round_up(n, LANES);
        float *at = memory.get(all);
        Word **words[] = {&q, &keys, &values, &weights};
        float **floats[] = {&out, &scores, &top, &total};
        for (int i = 0; i < 8; i++) {
            if (i < 4)
                *words[i] = (Word *)at;
            else
                *floats[i - 4] = at;
            at += round_up(sizes[i], LANES);
        }
    }
};

// `product` of floats in 16 columns, where a register is narrower than that: the sums stay in registers.
template <int ROWS>
inline void narrow_product(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t inner, float *c,
                           int64_t c_stride, bool add) {
    register_floats acc[ROWS][SPLIT];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int s = 0; s < SPLIT; s++)
            acc[m][s] = add ? *(const register_floats_u *)(c + m * c_stride + s * REGISTER_LANES) : register_floats{};
    for (int64_t k = 0; k < inner; k++) {
        const register_floats_u *w = (const register_floats_u *)(b + k * b_stride);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
            for (int s = 0; s < SPLIT; s++) acc[m][s] = w[s] * a[m * a_stride + k] + acc[m][s];
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int s = 0; s < SPLIT; s++) *(register_floats_u *)(c + m * c_stride + s * REGISTER_LANES) = acc[m][s];
}

// c [ROWS][c_stride] (16 * V columns) = or += a [ROWS][a_stride] x b [inner][b_stride], of words.
template <class Words, int ROWS, int V>
inline void product(const typename Words::Word *a, int64_t a_stride, const typename Words::Word *b, int64_t b_stride,
                    int64_t inner, float *c, int64_t c_stride, bool add) {
    if constexpr (SPLIT > 1 && Words::of == 1) {
        for (int64_t n = 0; n < V * LANES; n += LANES)
            narrow_product<ROWS>(a, a_stride, b + n, b_stride, inner, c + n, c_stride, add);
        return;
    }
    f32x16 acc[ROWS][V];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) acc[m][v] = add ? load16(c + m * c_stride + v * LANES) : f32x16{};
    for (int64_t k = 0; k < inner; k++) {
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
                acc[m][v] = Words::add(acc[m][v], b + k * b_stride + v * LANES, a[m * a_stride + k]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store16(c + m * c_stride + v * LANES, acc[m][v]);
}

template <class Words, int V>
void product_rows(int64_t rows, const typename Words::Word *a, int64_t a_stride, const typename Words::Word *b,
                  int64_t b_stride, int64_t inner, float *c, int64_t c_stride, bool add) {
    int64_t m = 0;
    for (; m + BLOCK <= rows; m += BLOCK)
        product<Words, BLOCK, V>(a + m * a_stride, a_stride, b, b_stride, inner, c + m * c_stride, c_stride, add);
    a += m * a_stride, c += m * c_stride;
    switch (rows - m) {
    case 1: return product<Words, 1, V>(a, a_stride, b, b_stride, inner, c, c_stride, add);
    case 2: return product<Words, 2, V>(a, a_stride, b, b_stride, inner, c, c_stride, add);
    case 3: return product<Words, 3, V>(a, a_stride, b, b_stride, inner, c, c_stride, add);
    case 4: return product<Words, 4, V>(a, a_stride, b, b_stride, inner, c, c_stride, add);
    case 5: return product<Words, 5, V>(a, a_stride, b, b_stride, inner, c, c_stride, add);
    }
}

#ifdef __AVX512BF16__
struct Pairs {
    typedef uint32_t Word;
    static constexpr int of = 2;
    static inline f32x16 load(const bf16 *head, int64_t D, int64_t d) { return load_pairs(head + d, D - d); }
    static inline f32x16 add(f32x16 sums, const uint32_t *b, uint32_t a) {
        return dot2(sums, *(const u32x16u *)b, splat_word(a));
    }
};
using WordsOfBf16 = Pairs;
#else
using WordsOfBf16 = Floats;
#endif

// The keys and the values of a tile, one head of each token. count: how many tokens there are.
template <class T> struct Tile {
    const T *keys[TILE], *values[TILE];
    int64_t count = 0;
    // A head's cache from `start` on, before `stop`; table: the row's blocks.
    void find(const T *k_cache, const T *v_cache, const int32_t *table, int64_t start, int64_t stop, int64_t head,
              const AttentionShape &s) {
        count = std::min<int64_t>(TILE, stop - start);
        const int32_t *block = table + start / s.page_size;
        int64_t offset = start % s.page_size;
        for (int64_t j = 0; j < count; j++) {
            const int64_t at = ((*block * s.page_size + offset) * s.KVH + head) * s.D;
            keys[j] = k_cache + at;
            values[j] = v_cache + at;
            if (++offset == s.page_size) offset = 0, block++;
        }
    }
};

// To the second cache: heads of neighbouring tokens lie a power of two apart and would push each other out of the first.
template <class T> inline void prefetch(const T *p, int64_t D) {
    for (int64_t d = 0; d < D; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + d, 0, 2);
}

// Keys of up to 16 tokens as 16 columns of [D][64]; zeros where a column has no key.
template <class Words, bool WHOLE, class T>
inline void turn(const T *const *keys, int64_t count, int64_t D, typename Words::Word *to) {
    constexpr int of = Words::of;
    for (int64_t d = 0; d < D; d += of * LANES) {
        f32x16 square[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            square[i] = WHOLE || i < count ? Words::load(keys[i], D, d) : f32x16{};
        transpose16(square, (float *)to + d / of * TILE, TILE);
    }
}

// The values of tokens j (and j + 1, where words are pairs) of a tile as a row of words [V].
template <class T> inline void join(const Tile<T> &tile, int64_t j, int64_t V, float *to) {
    for (int64_t d = 0; d < V; d += LANES) store16(to + d, load16(tile.values[j] + d));
}
inline void join(const Tile<bf16> &tile, int64_t j, int64_t V, uint32_t *to) {
    const bf16 *even = tile.values[j], *odd = tile.values[j + 1 < tile.count ? j + 1 : j];
    const u32x16 kept = splat_word(j + 1 < tile.count ? 0xffff0000u : 0);
    for (int64_t d = 0; d < V; d += LANES)
        *(u32x16u *)(to + d) = load_words(even + d) | ((load_words(odd + d) << 16) & kept);
}

// A tile becomes words: keys [D][64] and values [64][V], of what there is. Meanwhile the next tile comes nearer: no
// processor sees by itself where a paged cache goes on.
template <class Words, class T>
void lay_out(const Tile<T> &tile, const Tile<T> &next, int64_t D, int64_t V, typename Words::Word *keys,
             typename Words::Word *values) {
    for (int64_t j = 0; j < tile.count; j += LANES) {
        if (j + LANES <= tile.count)
            turn<Words, true>(tile.keys + j, LANES, D, keys + j);
        else
            turn<Words, false>(tile.keys + j, tile.count - j, D, keys + j);
        for (int64_t i = j; i < std::min(j + LANES, next.count); i++) prefetch(next.keys[i], D);
    }
    for (int64_t j = 0; j < tile.count; j += Words::of) {
        join(tile, j, V, values + j / Words::of * V);
        for (int64_t i = j; i < std::min(j + Words::of, next.count); i++) prefetch(next.values[i], V);
    }
    for (int64_t j = tile.count; j < next.count; j++) prefetch(next.keys[j], D), prefetch(next.values[j], V);
}

template <class T> inline void query_words(const T *from, int64_t D, float *to) {
    for (int64_t d = 0; d < D; d += LANES) store16(to + d, load16(from + d));
}
inline void query_words(const bf16 *from, int64_t D, uint32_t *to) { memcpy(to, from, D * sizeof(bf16)); }

inline void weight_words(const float *from, float *to) {
    for (int v = 0; v < TILE; v += LANES) store16(to + v, load16(from + v));
}
inline void weight_words(const float *from, uint32_t *to) {
    for (int v = 0; v < TILE; v += LANES) store16((bf16 *)to + v, load16(from + v));
}

// One query's scores of a tile become weights; its sum and its output so far are scaled to the new maximum.
// Keys [from, to) of the tile are seen.
inline void soften(float *scores, int64_t from, int64_t to, const AttentionShape &s, float *top, float *total, float *out,
                   int64_t V) {
    f32x16 best = splat(LOWEST);
    for (int v = 0; v < TILE; v += LANES) {
        f32x16 x = load16(scores + v) * s.scale;
        if (s.softcap > 0) {  // c * tanh(x / c), tanh(y) = 1 - 2 / (e^2y + 1)
            f32x16 y = x * (2.0f / s.softcap);
            y = y > 80.0f ? splat(80.0f) : y;
            x = (1.0f - 2.0f / (vexp(y) + 1.0f)) * s.softcap;
        }
        const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const i32x16 key = lane + v;
        x = (key >= int(from)) & (key < int(to)) ? x : splat(LOWEST);
        store16(scores + v, x);
        best = vmax(best, x);
    }
    const float old_top = *top, new_top = std::max(old_top, largest(best));
    f32x16 sums = {};
    for (int v = 0; v < TILE; v += LANES) {
        f32x16 p = vexp(load16(scores + v) - new_top);
        store16(scores + v, p);
        sums += p;
    }
    const float keep = old_top == LOWEST ? 0.0f : vexp(splat(old_top - new_top))[0];
    *total = *total * keep + sum(sums);
    *top = new_top;
    if (keep != 1.0f)
        for (int64_t d = 0; d < V; d += LANES) store16(out + d, load16(out + d) * keep);
}

// A piece's queries attend to one tile, whose first key is at position `at`. first_seen: the position of the first query;
// group: queries a token.
template <class Words, class T>
void attend_tile(const Tile<T> &tile, const Tile<T> &next, int64_t at, int64_t first_seen, int64_t group, int64_t queries,
                 int64_t V, const AttentionShape &s, Buffers<Words> &b) {
    constexpr int of = Words::of;
    const int64_t deep = s.D / of;
    // queries before `skip` lie before the tile and see nothing of it
    const int64_t skip = std::max<int64_t>(0, at - first_seen) * group;
    lay_out<Words>(tile, next, s.D, V, b.keys, b.values);
    product_rows<Words, TILE / LANES>(queries - skip, b.q + skip * deep, deep, b.keys, TILE, deep,
                                      b.scores + skip * TILE, TILE, false);
    for (int64_t i = skip; i < queries; i++) {
        const int64_t position = first_seen + i / group;
        const int64_t from = s.window ? std::max<int64_t>(0, position + 1 - s.window - at) : 0;
        const int64_t to = std::min<int64_t>(TILE, position + 1 - at);
        float *scores = b.scores + i * TILE;
        if (from < to)
            soften(scores, from, to, s, b.top + i, b.total + i, b.out + i * V, V);
        else
            memset(scores, 0, TILE * sizeof(float));
        weight_words(scores, b.weights + i * TILE / of);
    }
    const typename Words::Word *weights = b.weights + skip * TILE / of;
    const int64_t inner = (tile.count + of - 1) / of;
    int64_t d = 0;
    for (; d + 4 * LANES <= V; d += 4 * LANES)
        product_rows<Words, 4>(queries - skip, weights, TILE / of, b.values + d, V, inner, b.out + skip * V + d, V,
                               true);
    for (; d < V; d += LANES)
        product_rows<Words, 1>(queries - skip, weights, TILE / of, b.values + d, V, inner, b.out + skip * V + d, V,
                               true);
}

}  // namespace

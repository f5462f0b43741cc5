// Causal attention of a ragged batch over the paged cache: prefill, chunks and decode in one way.
//
// A piece of work is one row of the batch, one key head and up to QUERY_TOKENS of the row's new tokens; their queries of
// the heads that share the key head stand below each other ([queries][D]). Keys come in tiles of 64, at multiples of 64 from
// the row's first token; for each tile, keys (transposed) and values are widened to floats once and used by all queries:
//
//     scores [queries][64] = q K^T;  running maximum and sum (Milakov and Gimelshein 2018);  out += exp(scores) V
//
// A query's result depends on its own keys only, in their order: not on the chunk, the batch or the number of threads.
#include "kernels.h"
#include "scratch.h"
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>
#include <omp.h>

namespace {

constexpr int TILE = 64;  // keys
constexpr int QUERY_TOKENS = 32;
constexpr int BLOCK = 6;  // queries at once: 6 x 4 accumulators
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

struct Piece {
    int64_t row, kv_head, first, count;  // new tokens [first, first + count) of the row
};

// Floats of one thread, kept between calls.
struct Buffers {
    Scratch memory;
    float *q, *out, *scores, *keys, *values, *top, *total;
    void fit(int64_t queries, int64_t D) {
        const int64_t sizes[] = {queries * D, queries * D, queries * TILE, D * TILE, TILE * D, queries, queries};
        int64_t all = 0;
        for (int64_t n : sizes) all += round_up(n, LANES);
        float *at = memory.get(all);
        float **parts[] = {&q, &out, &scores, &keys, &values, &top, &total};
        for (int i = 0; i < 7; i++) {
            *parts[i] = at;
            at += round_up(sizes[i], LANES);
        }
    }
};

// c [ROWS][c_stride] (16 * V columns) = or += a [ROWS][a_stride] x b [inner][b_stride].
template <int ROWS, int V>
inline void product(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t inner, float *c,
                    int64_t c_stride, bool add) {
    f32x16 acc[ROWS][V];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) acc[m][v] = add ? load16(c + m * c_stride + v * LANES) : f32x16{};
    for (int64_t k = 0; k < inner; k++) {
        f32x16 w[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) w[v] = load16(b + k * b_stride + v * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[m][v] = w[v] * a[m * a_stride + k] + acc[m][v];
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store16(c + m * c_stride + v * LANES, acc[m][v]);
}

template <int V>
void product_rows(int64_t rows, const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t inner, float *c,
                  int64_t c_stride, bool add) {
    int64_t m = 0;
    for (; m + BLOCK <= rows; m += BLOCK)
        product<BLOCK, V>(a + m * a_stride, a_stride, b, b_stride, inner, c + m * c_stride, c_stride, add);
    a += m * a_stride, c += m * c_stride;
    switch (rows - m) {
    case 1: return product<1, V>(a, a_stride, b, b_stride, inner, c, c_stride, add);
    case 2: return product<2, V>(a, a_stride, b, b_stride, inner, c, c_stride, add);
    case 3: return product<3, V>(a, a_stride, b, b_stride, inner, c, c_stride, add);
    case 4: return product<4, V>(a, a_stride, b, b_stride, inner, c, c_stride, add);
    case 5: return product<5, V>(a, a_stride, b, b_stride, inner, c, c_stride, add);
    }
}

// Keys [count][D] of a tile as floats [D][64], values as floats [64][D]; places past `count` become zeros.
template <class T>
void widen_tile(const T *k_cache, const T *v_cache, const int32_t *table, int64_t start, int64_t count, int64_t head,
                const AttentionShape &s, float *keys, float *values) {
    const int64_t token = s.KVH * s.D;
    const T *k_rows[TILE], *v_rows[TILE];
    for (int64_t j = 0; j < count; j++) {
        const int64_t position = start + j;
        const int64_t slot = table[position / s.page_size] * s.page_size + position % s.page_size;
        k_rows[j] = k_cache + slot * token + head * s.D;
        v_rows[j] = v_cache + slot * token + head * s.D;
    }
    for (int64_t j = 0; j < TILE; j += LANES)
        for (int64_t d = 0; d < s.D; d += LANES) {
            f32x16 square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = j + i < count ? load16(k_rows[j + i] + d) : f32x16{};
            transpose16(square, keys + d * TILE + j, TILE);
        }
    for (int64_t j = 0; j < TILE; j++)
        for (int64_t d = 0; d < s.D; d += LANES)
            store16(values + j * s.D + d, j < count ? load16(v_rows[j] + d) : f32x16{});
}

// One query's scores of a tile become weights; its sum and its output so far are scaled to the new maximum.
// Keys [from, to) of the tile are seen.
inline void soften(float *scores, int64_t from, int64_t to, const AttentionShape &s, float *top, float *total, float *out) {
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
        for (int64_t d = 0; d < s.D; d += LANES) store16(out + d, load16(out + d) * keep);
}

template <class T>
void attend(const T *q, const T *k_cache, const T *v_cache, const int32_t *tables, int64_t cached, int64_t first_token,
            const Piece &piece, const float *sinks, T *y, const AttentionShape &s, Buffers &b) {
    const int64_t group = s.H / s.KVH, queries = piece.count * group;
    b.fit(queries, s.D);
    const int64_t head = piece.kv_head * group;
    for (int64_t i = 0; i < queries; i++) {
        const T *from = q + ((first_token + piece.first + i / group) * s.H + head + i % group) * s.D;
        for (int64_t d = 0; d < s.D; d += LANES) store16(b.q + i * s.D + d, load16(from + d));
    }
    memset(b.out, 0, queries * s.D * sizeof(float));
    for (int64_t i = 0; i < queries; i++)  // a sink is a key of its head with a score and no value
        b.top[i] = sinks ? sinks[head + i % group] : LOWEST, b.total[i] = sinks ? 1 : 0;
    const int64_t first_seen = cached + piece.first;  // position of the first query
    const int64_t stop = first_seen + piece.count;
    const int64_t start = s.window ? std::max<int64_t>(0, first_seen + 1 - s.window) / TILE * TILE : 0;
    for (int64_t tile = start; tile < stop; tile += TILE) {
        const int64_t count = std::min<int64_t>(TILE, stop - tile);
        // queries before `skip` lie before the tile and see nothing of it
        const int64_t skip = std::max<int64_t>(0, tile - first_seen) * group;
        widen_tile(k_cache, v_cache, tables + piece.row * s.table_width, tile, count, piece.kv_head, s, b.keys, b.values);
        float *scores = b.scores + skip * TILE;
        product_rows<TILE / LANES>(queries - skip, b.q + skip * s.D, s.D, b.keys, TILE, s.D, scores, TILE, false);
        for (int64_t i = skip; i < queries; i++) {
            const int64_t position = first_seen + i / group;
            const int64_t from = s.window ? std::max<int64_t>(0, position + 1 - s.window - tile) : 0;
            const int64_t to = std::min<int64_t>(TILE, position + 1 - tile);
            if (from < to)
                soften(b.scores + i * TILE, from, to, s, b.top + i, b.total + i, b.out + i * s.D);
            else
                memset(b.scores + i * TILE, 0, TILE * sizeof(float));
        }
        int64_t d = 0;
        for (; d + 4 * LANES <= s.D; d += 4 * LANES)
            product_rows<4>(queries - skip, scores, TILE, b.values + d, s.D, TILE, b.out + skip * s.D + d, s.D, true);
        for (; d < s.D; d += LANES)
            product_rows<1>(queries - skip, scores, TILE, b.values + d, s.D, TILE, b.out + skip * s.D + d, s.D, true);
    }
    for (int64_t i = 0; i < queries; i++) {
        T *to = y + ((first_token + piece.first + i / group) * s.H + head + i % group) * s.D;
        const float scale = 1.0f / b.total[i];
        for (int64_t d = 0; d < s.D; d += LANES) store16(to + d, load16(b.out + i * s.D + d) * scale);
    }
}

thread_local Buffers buffers;
thread_local std::vector<Piece> pieces;

template <class T>
void paged_attention(const T *q, const T *k_cache, const T *v_cache, const int32_t *tables, const int32_t *lengths,
                     const int32_t *indptr, const float *sinks, T *y, const AttentionShape &s, int threads) {
    std::vector<Piece> &work = pieces;
    work.clear();
    int64_t keys = 0;
    for (int64_t row = 0; row < s.B; row++) {
        const int64_t count = indptr[row + 1] - indptr[row];
        keys += count * (lengths[row] + count);
        for (int64_t head = 0; head < s.KVH; head++)
            for (int64_t first = 0; first < count; first += QUERY_TOKENS)
                work.push_back({row, head, first, std::min<int64_t>(QUERY_TOKENS, count - first)});
    }
    if (keys * s.H * s.D < 1 << 16) threads = 1;
    std::atomic<size_t> next{0};
    // from the back: the last pieces of a prompt see the most keys
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (size_t i; (i = next++) < work.size();) {
        const Piece &piece = work[work.size() - 1 - i];
        attend(q, k_cache, v_cache, tables, lengths[piece.row], indptr[piece.row], piece, sinks, y, s, buffers);
    }
}

}  // namespace

extern "C" {
void paged_attention_f32(const float *q, const float *k_cache, const float *v_cache, const int32_t *tables,
                         const int32_t *lengths, const int32_t *indptr, const float *sinks, float *y,
                         const AttentionShape *shape, int threads) {
    paged_attention<float>(q, k_cache, v_cache, tables, lengths, indptr, sinks, y, *shape, threads);
}
void paged_attention_bf16(const bf16 *q, const bf16 *k_cache, const bf16 *v_cache, const int32_t *tables,
                          const int32_t *lengths, const int32_t *indptr, const float *sinks, bf16 *y,
                          const AttentionShape *shape, int threads) {
    paged_attention<bf16>(q, k_cache, v_cache, tables, lengths, indptr, sinks, y, *shape, threads);
}
}

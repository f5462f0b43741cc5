// Causal attention of a ragged batch over a paged cache of latents: prefill, chunks and decode in one way.
//
// W_uk goes into the queries and W_uv into the results ("absorbed"), and all heads attend to the latents themselves, as in
// attention.cpp with one key head: keys are whole latents [L + R], values their first L numbers. Three passes over up to
// CHUNK_TOKENS new tokens, each over pieces that threads take from a common counter:
//
//     queries [token][head][L + R] = q W_uk | rope part        a piece: a head and some tokens
//     attended [token][head][L]                                a piece: some tokens of a row and some heads
//     y [token][head][V] = attended W_uv^T                     a piece: a head and some tokens
//
// latent_tiles.h multiplies bf16 in the processor's matrix registers where the system lets it. Here all is in floats: pairs
// of bf16 (AVX-512 BF16) were a quarter slower in prompts, with heads this wide, and no faster in decode.
// Sums of the first product are chains over P; of the last one 16 chains over L each, added as a tree. So a token's result
// depends on its own keys only, in their order: not on the chunk, the batch or the number of threads.
#include "attention.h"
#include "latent_tiles.h"

namespace {

constexpr int64_t COLUMNS = 64;

// The sums of 16 vectors, each added as the same tree.
inline f32x16 sums_of(const f32x16 vectors[LANES]) {
    float turned[LANES * LANES];
    transpose16(vectors, turned, LANES);
    f32x16 lanes[LANES];
    for (int i = 0; i < LANES; i++) lanes[i] = load16(turned + i * LANES);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// to [TOKENS][V of 16 / TOKENS] = attended [TOKENS][stride] times rows of W_uv. rows: of 16 / TOKENS outputs.
template <int TOKENS, class T>
inline void expand_block(const float *attended, int64_t stride, const T *const *rows, int64_t L, float *to) {
    constexpr int OUTPUTS = LANES / TOKENS;
    f32x16 acc[LANES] = {};
    for (int64_t l = 0; l < L; l += LANES) {
        f32x16 w[OUTPUTS];
#pragma GCC unroll 16
        for (int v = 0; v < OUTPUTS; v++) w[v] = load_upto(rows[v] + l, L - l);
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; t++) {
            const f32x16 a = load16(attended + t * stride + l);
#pragma GCC unroll 16
            for (int v = 0; v < OUTPUTS; v++) acc[t * OUTPUTS + v] = a * w[v] + acc[t * OUTPUTS + v];
        }
    }
    store16(to, sums_of(acc));
}

thread_local Scratch shared_queries, shared_attended, product_memory;
thread_local Buffers<Floats> buffers;

template <class T> struct Latents {
    static constexpr int64_t HEAD_TOKENS = 32;  // of a piece of a product with a head's weights
    static constexpr int64_t FEW_HEADS = 4;     // fewer in a piece cost more for laying out keys than a second thread saves
    struct Thread {
        Thread() {}
    };

    const LatentInputs<T> &in;
    const LatentShape &s;
    const int64_t D, width;  // of a latent; L rounded up to whole vectors, at most D
    const AttentionShape attention;
    float *const queries, *const attended;

    Latents(const LatentInputs<T> &in, int64_t tokens)
        : in(in), s(in.s), D(in.latent_width()), width(round_up(s.L, LANES)),
          attention{s.B, s.H, 1, D, s.page_size, s.table_width, 0, s.scale, 0},
          queries(shared_queries.get(tokens * s.H * D)), attended(shared_attended.get(tokens * s.H * width)) {}

    // Tokens [first, first + count) of one head, through W_uk.
    void absorb(int64_t base, int64_t head, int64_t first, int64_t count) const {
        const int64_t plain = round_up(s.P, LANES);
        float *rows = product_memory.get(count * plain + s.P * COLUMNS + count * D);
        float *tile = rows + count * plain, *out = tile + s.P * COLUMNS;
        for (int64_t i = 0; i < count; i++)
            for (int64_t p = 0; p < s.P; p += LANES)
                store16(rows + i * plain + p, load_upto(in.query(first + i, head) + p, s.P - p));
        const T *weights = in.key_weights(head);
        for (int64_t c = 0; c < width; c += COLUMNS) {
            const int64_t columns = std::min(COLUMNS, width - c);
            for (int64_t p = 0; p < s.P; p++)
                for (int64_t v = 0; v < columns; v += LANES)
                    store16(tile + p * COLUMNS + v, load_upto(weights + p * s.L + c + v, s.L - c - v));
            if (columns == COLUMNS) {
                product_rows<Floats, 4>(count, rows, plain, tile, COLUMNS, s.P, out + c, D, false);
                continue;
            }
            for (int64_t v = 0; v < columns; v += LANES)
                product_rows<Floats, 1>(count, rows, plain, tile + v, COLUMNS, s.P, out + c + v, D, false);
        }
        for (int64_t i = 0; i < count; i++) {
            for (int64_t r = 0; r < s.R; r++) out[i * D + s.L + r] = to_float(in.query(first + i, head)[s.P + r]);
            memcpy(queries + ((first - base + i) * s.H + head) * D, out + i * D, D * sizeof(float));
        }
    }

    void attend(int64_t base, const Piece &piece) const {
        Buffers<Floats> &b = buffers;
        const int64_t count = piece.count * piece.heads;
        b.fit(count, D, width);
        const auto place = [&](int64_t i) {
            return (piece.first_token - base + i / piece.heads) * s.H + piece.first_head + i % piece.heads;
        };
        for (int64_t i = 0; i < count; i++) {
            memcpy(b.q + i * D, queries + place(i) * D, D * sizeof(float));
            b.top[i] = LOWEST, b.total[i] = 0;
        }
        memset(b.out, 0, count * width * sizeof(float));
        const int64_t first_seen = in.lengths[piece.row] + piece.first_token - in.indptr[piece.row];
        const int64_t stop = first_seen + piece.count;
        const int32_t *table = in.tables + piece.row * s.table_width;
        Tile<T> tiles[2];
        tiles[0].find(in.cache, in.cache, table, 0, stop, 0, attention);
        for (int64_t at = 0, turn = 0; at < stop; at += TILE, turn ^= 1) {
            Tile<T> &next = tiles[turn ^ 1];
            next.count = 0;
            if (at + TILE < stop) next.find(in.cache, in.cache, table, at + TILE, stop, 0, attention);
            attend_tile(tiles[turn], next, at, first_seen, piece.heads, count, width, attention, b);
        }
        for (int64_t i = 0; i < count; i++) {
            const float scale = 1.0f / b.total[i];
            float *to = attended + place(i) * width;
            for (int64_t l = 0; l < width; l += LANES) store16(to + l, load16(b.out + i * width + l) * scale);
        }
    }

    template <int TOKENS> void expand_some(int64_t base, int64_t head, int64_t first) const {
        constexpr int OUTPUTS = LANES / TOKENS;
        const T *weights = in.value_weights(head);
        const float *from = attended + ((first - base) * s.H + head) * width;
        float *out = product_memory.get(TOKENS * round_up(s.V, LANES));
        for (int64_t v = 0; v < s.V; v += OUTPUTS) {
            const T *rows[OUTPUTS];
            for (int64_t i = 0; i < OUTPUTS; i++) rows[i] = weights + std::min(v + i, s.V - 1) * s.L;
            float block[LANES];
            expand_block<TOKENS>(from, s.H * width, rows, s.L, block);
            for (int t = 0; t < TOKENS; t++)
                memcpy(out + t * round_up(s.V, LANES) + v, block + t * OUTPUTS, OUTPUTS * sizeof(float));
        }
        for (int t = 0; t < TOKENS; t++)
            for (int64_t v = 0; v < s.V; v += LANES)
                store_outputs(in.result(first + t, head) + v, load16(out + t * round_up(s.V, LANES) + v), s.V - v);
    }

    // Tokens [first, first + count) of one head, through W_uv.
    void expand(int64_t base, int64_t head, int64_t first, int64_t count) const {
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) expand_some<4>(base, head, first + i);
        for (; i < count; i++) expand_some<1>(base, head, first + i);
    }
};

template <class T> void latent_attention(const LatentInputs<T> &in, int threads) { run_latent<Latents<T>>(in, threads); }

#ifdef MAX_RAY_AMX
template <> void latent_attention(const LatentInputs<bf16> &in, int threads) {
    if (amx::allowed())
        run_latent<TiledLatents>(in, threads);
    else
        run_latent<Latents<bf16>>(in, threads);
}
#endif

}  // namespace

#define MAX_RAY_LATENT(NAME, T)                                                                                           \
    void latent_attention_##NAME(const T *q, const T *up, const T *cache, const int32_t *tables, const int32_t *lengths,  \
                                 const int32_t *indptr, T *y, const LatentShape *shape, int threads) {                    \
        latent_attention<T>({q, up, cache, tables, lengths, indptr, y, *shape}, threads);                                 \
    }

extern "C" {
// Whether the matrix registers multiply here.
int has_matrix_registers() {
#ifdef MAX_RAY_AMX
    return amx::allowed();
#else
    return 0;
#endif
}

MAX_RAY_LATENT(f32, float)
MAX_RAY_LATENT(bf16, bf16)
MAX_RAY_LATENT(f16, f16)
}

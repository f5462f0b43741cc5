// Causal attention of a ragged batch over the paged cache: prefill, chunks and decode in one way.
//
// A piece of work is one row of the batch, one key head and up to QUERY_TOKENS of the row's new tokens; their queries of
// the heads that share the key head stand below each other ([queries][D]). Keys come in tiles of 64, at multiples of 64 from
// the row's first token; each tile's keys (transposed) and values are laid out once and used by all queries:
//
//     scores [queries][64] = q K^T;  running maximum and sum (Milakov and Gimelshein 2018);  out += exp(scores) V
//
// Both products are of words: floats, or where the processor multiplies bf16 (AVX-512 BF16) pairs of them, which are two
// neighbours of a head in q K^T, and the values of two neighbouring keys in the other; exp(scores) is rounded to bf16 then.
// Where it has matrix registers, attention_tiles.h takes the place of these words.
//
// A query's result depends on its own keys only, in their order: not on the chunk, the batch or the number of threads.
#include "attention.h"
#include "attention_tiles.h"
#include <atomic>
#include <type_traits>
#include <vector>
#include <omp.h>

namespace {

constexpr int QUERY_TOKENS = 32;

struct Piece {
    int64_t row, kv_head, first, count;  // new tokens [first, first + count) of the row
};

// What a piece reads of the cache.
struct Range {
    int64_t start, stop;  // positions; start is a multiple of TILE
    Range(const Piece &piece, const int32_t *lengths, int64_t window) {
        const int64_t first_seen = lengths[piece.row] + piece.first;
        start = window ? std::max<int64_t>(0, first_seen + 1 - window) / TILE * TILE : 0;
        stop = first_seen + piece.count;
    }
};

// The queries of a piece, and products of words.
template <class Words, class T> class Vectors {
    static constexpr int of = Words::of;
    Buffers<Words> &b;
    int64_t D = 0, queries = 0;

public:
    explicit Vectors(Buffers<Words> &buffers) : b(buffers) {}
    void begin(int64_t num_queries, int64_t width) {
        D = width, queries = num_queries;
        b.fit(queries, D, D);
        memset(b.out, 0, queries * D * sizeof(float));
    }
    void take(int64_t query, const T *from, float sink) {
        query_words(from, D, b.q + query * (D / of));
        b.top[query] = sink, b.total[query] = sink == LOWEST ? 0 : 1;
    }
    void settle() {}
    void attend(const Tile<T> &tile, const Tile<T> &next, int64_t at, int64_t first_seen, int64_t group,
                const AttentionShape &s) {
        attend_tile(tile, next, at, first_seen, group, queries, D, s, b);
    }
    const float *result(int64_t query) const { return b.out + query * D; }
    float sum_of_weights(int64_t query) const { return b.total[query]; }
};

// after: the piece that this thread probably gets next. A sink is a key of its head with a score and no value.
template <class Kernel, class T>
void attend(const T *q, const T *k_cache, const T *v_cache, const int32_t *tables, const int32_t *lengths,
            const int32_t *indptr, const Piece &piece, const Piece *after, const float *sinks, T *y, const AttentionShape &s,
            Kernel &kernel) {
    const int64_t group = s.H / s.KVH, queries = piece.count * group, head = piece.kv_head * group;
    const auto offset = [&](int64_t i) { return ((indptr[piece.row] + piece.first + i / group) * s.H + head + i % group) * s.D; };
    kernel.begin(queries, s.D);
    for (int64_t i = 0; i < queries; i++) kernel.take(i, q + offset(i), sinks ? sinks[head + i % group] : LOWEST);
    kernel.settle();
    const int64_t first_seen = lengths[piece.row] + piece.first;  // position of the first query
    const auto find = [&](Tile<T> &tile, const Piece &of, int64_t at, int64_t stop) {
        tile.find(k_cache, v_cache, tables + of.row * s.table_width, at, stop, of.kv_head, s);
    };
    const Range range(piece, lengths, s.window);
    Tile<T> tiles[2];
    find(tiles[0], piece, range.start, range.stop);
    for (int64_t at = range.start, turn = 0; at < range.stop; at += TILE, turn ^= 1) {
        const Tile<T> &tile = tiles[turn];
        Tile<T> &next = tiles[turn ^ 1];
        next.count = 0;
        if (at + TILE < range.stop) {
            find(next, piece, at + TILE, range.stop);
        } else if (after) {
            const Range later(*after, lengths, s.window);
            find(next, *after, later.start, later.stop);
        }
        kernel.attend(tile, next, at, first_seen, group, s);
    }
    for (int64_t i = 0; i < queries; i++) {
        T *to = y + offset(i);
        const float *from = kernel.result(i), scale = 1.0f / kernel.sum_of_weights(i);
        for (int64_t d = 0; d < s.D; d += LANES) store16(to + d, load16(from + d) * scale);
    }
}

template <class Words> thread_local Buffers<Words> buffers;
thread_local std::vector<Piece> pieces;

thread_local Scratch registers_memory;

// use(the kernel of this thread).
template <class Words, class T, class Use> void with_kernel(Use use) {
#ifdef MAX_RAY_AMX
    if constexpr (std::is_same<T, bf16>::value)
        if (amx::allowed()) {
            Registers kernel(registers_memory);
            return use(kernel);
        }
#endif
    Vectors<Words, T> kernel(buffers<Words>);
    use(kernel);
}

template <class Words, class T>
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
    with_kernel<Words, T>([&](auto &kernel) {
        for (size_t i; (i = next++) < work.size();) {
            const Piece *piece = &work[work.size() - 1 - i], *after = i + threads < work.size() ? piece - threads : nullptr;
            attend(q, k_cache, v_cache, tables, lengths, indptr, *piece, after, sinks, y, s, kernel);
        }
    });
}

}  // namespace

#define MAX_RAY_ATTENTION(NAME, T, WORDS)                                                                                 \
    void paged_attention_##NAME(const T *q, const T *k_cache, const T *v_cache, const int32_t *tables,                    \
                                const int32_t *lengths, const int32_t *indptr, const float *sinks, T *y,                  \
                                const AttentionShape *shape, int threads) {                                               \
        paged_attention<WORDS>(q, k_cache, v_cache, tables, lengths, indptr, sinks, y, *shape, threads);                  \
    }

extern "C" {
MAX_RAY_ATTENTION(f32, float, Floats)
MAX_RAY_ATTENTION(bf16, bf16, WordsOfBf16)
MAX_RAY_ATTENTION(f16, f16, Floats)
}

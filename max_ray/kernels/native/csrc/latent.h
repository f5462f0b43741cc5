// What the kernels of attention over latents share: the inputs, and how a batch is cut into pieces. See latent.cpp.
#pragma once
#include "kernels.h"
#include "scratch.h"
#include <atomic>
#include <vector>
#include <omp.h>

namespace {

constexpr int64_t CHUNK_TOKENS = 128;
constexpr int64_t QUERIES = 128;  // of a piece of attention

template <class T> inline f32x16 load_upto(const T *p, int64_t left) {
    return left >= LANES ? load16(p) : load_part(p, left);
}

template <class T> struct LatentInputs {
    const T *q, *up, *cache;
    const int32_t *tables, *lengths, *indptr;
    T *y;
    const LatentShape &s;
    int64_t latent_width() const { return s.L + s.R; }
    const T *query(int64_t token, int64_t head) const { return q + (token * s.H + head) * (s.P + s.R); }
    const T *key_weights(int64_t head) const { return up + head * (s.P + s.V) * s.L; }  // W_uk [P][L]
    const T *value_weights(int64_t head) const { return key_weights(head) + s.P * s.L; }  // W_uv [V][L]
    T *result(int64_t token, int64_t head) const { return y + (token * s.H + head) * s.V; }
};

struct Piece {
    int64_t row, first_token, count, first_head, heads;  // tokens of the whole batch
};

// Tokens [base, stop) row by row, `heads` at once.
inline void cut(const LatentShape &s, const int32_t *indptr, int64_t base, int64_t stop, int64_t heads,
                std::vector<Piece> &to) {
    to.clear();
    const int64_t tokens = std::max<int64_t>(1, QUERIES / heads);
    for (int64_t row = 0; row < s.B; row++) {
        const int64_t end = std::min<int64_t>(indptr[row + 1], stop);
        for (int64_t first = std::max<int64_t>(indptr[row], base); first < end; first += tokens)
            for (int64_t head = 0; head < s.H; head += heads)
                to.push_back({row, first, std::min(tokens, end - first), head, std::min(heads, s.H - head)});
    }
}

thread_local std::vector<Piece> chunk_pieces;

// The three passes over tokens [base, stop). Kernel: absorb and expand take a head and some tokens, attend a piece, each
// with the chunk's first token; Kernel::Thread lives as long as a thread works.
template <class Kernel> void run_chunk(const Kernel &kernel, int64_t base, int64_t stop, int threads) {
    const LatentShape &s = kernel.in.s;
    std::vector<Piece> &pieces = chunk_pieces;
    int64_t heads = std::min(s.H, QUERIES);
    for (cut(s, kernel.in.indptr, base, stop, heads, pieces); int64_t(pieces.size()) < threads && heads > Kernel::FEW_HEADS;
         cut(s, kernel.in.indptr, base, stop, heads, pieces))
        heads = (heads + 1) / 2;
    const int64_t blocks = (stop - base + Kernel::HEAD_TOKENS - 1) / Kernel::HEAD_TOKENS, parts = blocks * s.H;
    const int64_t count = pieces.size();
    const Piece *last = pieces.data() + count - 1;
    std::atomic<int64_t> absorbed{0}, seen{0}, expanded{0};
    const auto part = [&](int64_t i, auto run) {
        const int64_t first = base + i % blocks * Kernel::HEAD_TOKENS;
        run(i / blocks, first, std::min(Kernel::HEAD_TOKENS, stop - first));
    };
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const typename Kernel::Thread thread;
        for (int64_t i; (i = absorbed++) < parts;)
            part(i, [&](int64_t head, int64_t first, int64_t n) { kernel.absorb(base, head, first, n); });
#pragma omp barrier
        for (int64_t i; (i = seen++) < count;) kernel.attend(base, last[-i]);  // a prompt's last ones see the most keys
#pragma omp barrier
        for (int64_t i; (i = expanded++) < parts;)
            part(i, [&](int64_t head, int64_t first, int64_t n) { kernel.expand(base, head, first, n); });
    }
}

// Kernel(inputs, how many tokens a chunk has at most).
template <class Kernel, class T> void run_latent(const LatentInputs<T> &in, int threads) {
    const LatentShape &s = in.s;
    const int64_t tokens = in.indptr[s.B];
    if (tokens * s.H * (s.P + s.V) * s.L < 1 << 16) threads = 1;
    const Kernel kernel(in, std::min(tokens, CHUNK_TOKENS));
    for (int64_t base = 0; base < tokens; base += CHUNK_TOKENS)
        run_chunk(kernel, base, std::min(tokens, base + CHUNK_TOKENS), threads);
}

}  // namespace

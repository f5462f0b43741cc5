// Kernel calls as data: a list of them runs without the interpreter between them.
#include "kernels.h"
#include <cstddef>
#include <utility>

namespace {

struct Call {
    void (*again)(const int64_t *);
    int64_t arguments[12];
};

// One argument out of its word: a pointer or an integer is the word's value, a float its first four bytes.
template <class A> A from_word(const int64_t &word) { return A(word); }
template <> float from_word<float>(const int64_t &word) {
    float value;
    memcpy(&value, &word, sizeof(value));
    return value;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), const int64_t *words, std::index_sequence<I...>) {
    kernel(from_word<A>(words[I])...);
}
template <class... A> void call(void (*kernel)(A...), const int64_t *words) {
    static_assert(sizeof...(A) <= sizeof(Call::arguments) / sizeof(int64_t), "a kernel with more arguments than a Call holds");
    call(kernel, words, std::index_sequence_for<A...>());
}

}  // namespace

#define MAX_RAY_AGAIN(KERNEL)                                                                                             \
    void KERNEL##_f32_again(const int64_t *words) { call(KERNEL##_f32, words); }                                          \
    void KERNEL##_bf16_again(const int64_t *words) { call(KERNEL##_bf16, words); }                                        \
    void KERNEL##_f16_again(const int64_t *words) { call(KERNEL##_f16, words); }

extern "C" {
MAX_RAY_AGAIN(linear)
MAX_RAY_AGAIN(pack)
MAX_RAY_AGAIN(rows)
MAX_RAY_AGAIN(rmsnorm)
MAX_RAY_AGAIN(add_rmsnorm)
MAX_RAY_AGAIN(silu_and_mul)
MAX_RAY_AGAIN(gather_rows)
MAX_RAY_AGAIN(sum_rows)
MAX_RAY_AGAIN(argmax)
MAX_RAY_AGAIN(rope_and_append)
MAX_RAY_AGAIN(paged_attention)
MAX_RAY_AGAIN(latent_attention)
MAX_RAY_AGAIN(q4k_linear)
MAX_RAY_AGAIN(q5k_linear)
MAX_RAY_AGAIN(q6k_linear)
MAX_RAY_AGAIN(q8_linear)
MAX_RAY_AGAIN(q4_linear)
MAX_RAY_AGAIN(q41_linear)
MAX_RAY_AGAIN(q4k_int8)
MAX_RAY_AGAIN(q5k_int8)
MAX_RAY_AGAIN(q6k_int8)
MAX_RAY_AGAIN(q8_int8)
MAX_RAY_AGAIN(q4_int8)
MAX_RAY_AGAIN(q41_int8)
void linear_dot_bf16_again(const int64_t *words) { call(linear_dot_bf16, words); }
void linear_tiles_bf16_again(const int64_t *words) { call(linear_tiles_bf16, words); }
void decode_slots_i64_again(const int64_t *words) { call(decode_slots_i64, words); }
void positions_i64_again(const int64_t *words) { call(positions_i64, words); }

void replay(const Call *calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) calls[i].again(calls[i].arguments);
}
}

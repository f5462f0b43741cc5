// The processor's matrix registers (AMX), where it has them: eight of 16 rows of 64 bytes.
//
// tdpbf16ps adds to c [16][16] of float32 the product of a [16][32] and b [32][16] of bf16, b as words of two neighbours in
// a column: [16 pairs][16 columns]. It rounds to nearest even and takes subnormal numbers for zeros, whatever the
// processor's modes are. The order of a sum depends on nothing but its length: a row's result not on the rows beside it.
#pragma once
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define MAX_RAY_AMX
#include "vec.h"
#include <algorithm>
#include <sys/syscall.h>
#include <unistd.h>
#include <utility>

namespace amx {

constexpr int64_t SIDE = 16;            // rows, and words in a row
constexpr int64_t DEEP = 32;            // numbers in a row
constexpr int64_t WORDS = SIDE * SIDE;  // of a register
constexpr int64_t BYTES = WORDS * 4;

// Whether the system lets this process use them: asked once, for all threads.
inline bool allowed() {
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool is_allowed = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return is_allowed;
}

// As `ldtilecfg` reads it.
struct alignas(64) Shape {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// The thread's registers as long as this lives: of 16 rows, or those of c and a (0 to 5, see `step`) of `side`. Another
// library's shapes are as they were afterwards.
class InUse {
    Shape before;

public:
    explicit InUse(int64_t side = SIDE) {
        asm volatile("sttilecfg %0" : "=m"(before));
        Shape shape = {};
        shape.palette = 1;
        for (int i = 0; i < 8; i++) shape.row_bytes[i] = 64, shape.rows[i] = i < 6 ? side : SIDE;
        asm volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~InUse() {
        if (before.palette)
            asm volatile("ldtilecfg %0" ::"m"(before));
        else
            asm volatile("tilerelease");
    }
    InUse(const InUse &) = delete;
};

// Subnormal numbers are zeros as long as this lives, as they are for the matrix registers: what vector
// registers compute instead of them is equal to the bit.
class NoSubnormals {
    const unsigned before = _mm_getcsr();

  public:
    NoSubnormals() { _mm_setcsr(before | 0x8040); }
    ~NoSubnormals() { _mm_setcsr(before); }
    NoSubnormals(const NoSubnormals &) = delete;
};

template <int R> inline void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(R)); }
template <int R> inline void load(const void *from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(R), "r"(from), "r"(stride) : "memory");
}
template <int R> inline void store(void *to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(R), "r"(to), "r"(stride) : "memory");
}
template <int C, int A, int B> inline void add_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Registers of a or b in memory. Bytes between: rows; registers along the sum; registers along c's rows or columns.
struct Operand {
    const void *at;
    int64_t row, deep, side;
    const void *of(int64_t i, int64_t k) const { return (const char *)at + i * side + k * deep; }
    Operand from(int64_t i) const { return {of(i, 0), row, deep, side}; }
};

// Registers [16][16] of c in memory, each in one piece. Floats between: registers along the rows, along the columns.
struct Result {
    float *at;
    int64_t down, right;
    float *of(int64_t m, int64_t n) const { return at + m * down + n * right; }
};

// Register I of c: 0 .. 3 hold c, 4 and 5 a, 6 and 7 b. What is shared is read with the first that needs it.
template <int M, int N, int I> inline void step(const Operand &a, const Operand &b, int64_t k) {
    constexpr int m = I / N, n = I % N;
    if constexpr (n == 0) load<4 + m % 2>(a.of(m, k), a.row);
    if constexpr (m == 0) load<6 + n % 2>(b.of(n, k), b.row);
    add_product<I, 4 + m % 2, 6 + n % 2>();
}

template <int M, int N, int... I>
inline void product(const Operand &a, const Operand &b, int64_t inner, const Result &c, bool add,
                    std::integer_sequence<int, I...>) {
    static_assert(M * N <= 4 && (M <= 2 || N == 1) && (N <= 2 || M == 1), "more than the registers hold");
    if (add)
        (load<I>(c.of(I / N, I % N), SIDE * 4), ...);
    else
        (zero<I>(), ...);
    for (int64_t k = 0; k < inner; k++) (step<M, N, I>(a, b, k), ...);
    (store<I>(c.of(I / N, I % N), SIDE * 4), ...);
}

template <int M, int N> void product(const Operand &a, const Operand &b, int64_t inner, const Result &c, bool add) {
    product<M, N>(a, b, inner, c, add, std::make_integer_sequence<int, M * N>());
}

// How many registers of c are made at once of rows x columns that are left: four where it can be.
inline int64_t rows_at_once(int64_t rows, int64_t columns) { return std::min<int64_t>(rows, columns > 1 ? 2 : 4); }
inline int64_t columns_at_once(int64_t rows, int64_t columns) { return std::min<int64_t>(columns, rows > 1 ? 2 : 4); }

// c = or += a b, `rows` x `columns` registers as the two functions above cut them.
inline void product(int64_t rows, int64_t columns, const Operand &a, const Operand &b, int64_t inner, const Result &c,
                    bool add) {
    switch (rows * 8 + columns) {
    case 8 + 1: return product<1, 1>(a, b, inner, c, add);
    case 8 + 2: return product<1, 2>(a, b, inner, c, add);
    case 8 + 3: return product<1, 3>(a, b, inner, c, add);
    case 8 + 4: return product<1, 4>(a, b, inner, c, add);
    case 16 + 1: return product<2, 1>(a, b, inner, c, add);
    case 16 + 2: return product<2, 2>(a, b, inner, c, add);
    case 24 + 1: return product<3, 1>(a, b, inner, c, add);
    case 32 + 1: return product<4, 1>(a, b, inner, c, add);
    }
}

// use(m, rows, n, columns) for parts of c; a part's columns change last.
template <class Use> inline void each_part(int64_t M, int64_t N, Use use) {
    const int64_t columns = columns_at_once(M, N), rows = rows_at_once(M, N);
    for (int64_t n = 0; n < N; n += columns)
        for (int64_t m = 0; m < M; m += rows) use(m, std::min(rows, M - m), n, std::min(columns, N - n));
}

}  // namespace amx
#endif

// GGUF's quantized blocks that have no kind of tiles of their own: into tiles of bytes (ToQ8) or of 6 bits (ToQ6K), to the
// bit as weights/gguf_other_blocks.py defines it, where the blocks are described. Q5_1 and Q2_K are rounded to 8 bits
// as weights/quantize.py does it.
#include "block_tiles.h"
#include "tiles.h"

namespace {

using namespace block_tiles;

typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16u __attribute__((vector_size(16), aligned(1)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

constexpr float TINY = 1e-20f, LARGEST = 127.0f, ROUNDING = 12582912.0f;  // 1.5 * 2^23

// 16 bytes as the codes of 32 columns: 0..15 in the low nibbles, 16..31 in the high ones.
struct Nibbles {
    u8x16 low, high;
    explicit Nibbles(const uint8_t *bytes) {
        const u8x16 all = *(const u8x16u *)bytes;
        low = all & 15;
        high = all >> 4;
    }
};

// Adds 16 where the 32 bits from `bytes` on, one a column, are set.
static inline void add_fifth_bits(Nibbles &codes, const uint8_t *bytes) {
    const u8x16 bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    u8x16 of_low, of_high;
    for (int i = 0; i < 16; i++) of_low[i] = bytes[i / 8], of_high[i] = bytes[2 + i / 8];
    codes.low |= (u8x16)((of_low & bit) != 0) & 16;
    codes.high |= (u8x16)((of_high & bit) != 0) & 16;
}


static inline i32x16 words_of(u8x16 codes) {
#ifdef __AVX512F__
    return (i32x16)_mm512_cvtepu8_epi32((__m128i)codes);
#else
    return __builtin_convertvector(__builtin_convertvector(codes, u16x16), i32x16);
#endif
}

static inline f32x16 floats(u8x16 codes) { return number(words_of(codes)); }

// The codes of a group of 32 columns, a byte each.
static inline void put_bytes(const Tiles &to, i8x16 low, i8x16 high, int64_t g, int r) {
    uint8_t bytes[32];
    memcpy(bytes, &low, 16);
    memcpy(bytes + 16, &high, 16);
    for (int i = 0; i < 8; i++) to.codes[g * WORDS_8 + i * LANES + r] = word(bytes + 4 * i);
}

// Numbers over the scale, rounded to the nearest, ties to even, within -127 .. 127.
static inline i8x16 to_codes(f32x16 numbers, float scale) {
    const f32x16 quotients = numbers / scale;
    const f32x16 at_most = quotients > LARGEST ? splat(LARGEST) : quotients;
    const f32x16 within = at_most < -LARGEST ? splat(-LARGEST) : at_most;
    const f32x16 shifted = within + ROUNDING;  // the integer ends up in the low bits
    int8_t codes[LANES];
    store_signed_bytes(codes, (i32x16)shifted - (i32x16)splat(ROUNDING));
    i8x16 result;
    memcpy(&result, codes, LANES);
    return result;
}

// Magnitudes as integers: their bits are in the order of the numbers, and those of NaN above all.
static inline i32x16 magnitudes(f32x16 numbers) { return (i32x16)numbers & 0x7fffffff; }

static inline float largest_magnitude(i32x16 a, i32x16 b) {
    const i32x16 both = a > b ? a : b;
    int32_t bits[LANES];
    memcpy(bits, &both, sizeof(bits));
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) bits[i] = std::max(bits[i], bits[i + half]);
    float largest;
    memcpy(&largest, bits, 4);
    return largest;
}

// Writes the scale of a group whose largest magnitude this is; gives what its numbers are divided by. What is not finite gives
// a scale that is not, for which the file is refused.
static inline float put_scale(const Tiles &to, float largest, int64_t g, int r) {
    const f16 scale = to_half(largest / LARGEST);
    to.super_scales[g * LANES + r] = scale.bits;
    return std::max(to_float(scale), TINY);
}

// 32 numbers, rounded to 8 bits.
static inline void put_rounded(const Tiles &to, f32x16 low, f32x16 high, int64_t g, int r) {
    const float divisor = put_scale(to, largest_magnitude(magnitudes(low), magnitudes(high)), g, r);
    put_bytes(to, to_codes(low, divisor), to_codes(high, divisor), g, r);
}

static inline float half_as_float(const uint8_t *p) { return to_float(f16{half(p)}); }

// Numbers are d q + m. The product is exact, so that a fused multiply-add gives the same.
struct Q5_1 {
    static constexpr int BYTES = 24, COLUMNS = 32;
    using Target = ToQ8;
    static void put(const Tiles &to, const uint8_t *block, int64_t b, int r) {
        const float d = half_as_float(block), m = half_as_float(block + 2);
        Nibbles codes(block + 8);
        add_fifth_bits(codes, block + 4);
        put_rounded(to, floats(codes.low) * d + m, floats(codes.high) * d + m, b, r);
    }
};

struct Q5_0 {
    static constexpr int BYTES = 22, COLUMNS = 32;
    using Target = ToQ8;
    static void put(const Tiles &to, const uint8_t *block, int64_t b, int r) {
        Nibbles codes(block + 6);
        add_fifth_bits(codes, block + 2);
        to.super_scales[b * LANES + r] = half(block);
        put_bytes(to, (i8x16)codes.low - 16, (i8x16)codes.high - 16, b, r);
    }
};

// 16 scales and mins of 4 bits; 32 columns are two runs of 16, each with a scale and a min.
struct Q2_K {
    static constexpr int BYTES = 84, COLUMNS = 256;
    using Target = ToQ8;
    static void put(const Tiles &to, const uint8_t *block, int64_t b, int r) {
        const float d = half_as_float(block + 80), m = half_as_float(block + 82);
        for (int j = 0; j < 8; j++) {
            f32x16 numbers[2];
            for (int run = 0; run < 2; run++) {
                const uint8_t scale = block[2 * j + run];
                const u8x16 codes = (*(const u8x16u *)(block + 16 + j / 4 * 32 + run * 16) >> (j % 4 * 2)) & 3;
                numbers[run] = floats(codes) * (d * float(scale & 15)) - m * float(scale >> 4);
            }
            put_rounded(to, numbers[0], numbers[1], b * 8 + j, r);
        }
    }
};

constexpr i8x16 IQ4_CODES = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr i8x16 MXFP4_CODES = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

static inline void put_looked_up(const Tiles &to, i8x16 table, const uint8_t *bytes, int64_t g, int r) {
    const Nibbles codes(bytes);
    put_bytes(to, __builtin_shuffle(table, codes.low), __builtin_shuffle(table, codes.high), g, r);
}

struct IQ4_NL {
    static constexpr int BYTES = 18, COLUMNS = 32;
    using Target = ToQ8;
    static void put(const Tiles &to, const uint8_t *block, int64_t b, int r) {
        to.super_scales[b * LANES + r] = half(block);
        put_looked_up(to, IQ4_CODES, block + 2, b, r);
    }
};

struct IQ4_XS {
    static constexpr int BYTES = 136, COLUMNS = 256;
    using Target = ToQ8;
    static void put(const Tiles &to, const uint8_t *block, int64_t b, int r) {
        const float d = half_as_float(block);
        const uint16_t high = half(block + 2);
        for (int j = 0; j < 8; j++) {
            const int scale = (block[4 + j / 2] >> (j % 2 * 4) & 15) | (high >> (2 * j) & 3) << 4;
            to.super_scales[(b * 8 + j) * LANES + r] = to_half(d * float(scale - 32)).bits;
            put_looked_up(to, IQ4_CODES, block + 8 + 16 * j, b * 8 + j, r);
        }
    }
};

// 2^(e - 128); below 2^-126 such a number has no exponent of its own.
static inline float power_of_two(int e) {
    const uint32_t bits = e < 2 ? 0x200000u << e : uint32_t(e - 1) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return power;
}

// The table has twice the numbers, the scale therefore half the power of two.
struct MXFP4 {
    static constexpr int BYTES = 17, COLUMNS = 32;
    using Target = ToQ8;
    static void put(const Tiles &to, const uint8_t *block, int64_t b, int r) {
        to.super_scales[b * LANES + r] = to_half(power_of_two(block[0])).bits;
        put_looked_up(to, MXFP4_CODES, block + 1, b, r);
    }
};

// Codes of 3 bits, the third apart, as codes of 6 bits around 32; 16 scales of 6 bits.
struct Q3_K {
    static constexpr int BYTES = 110, COLUMNS = 256;
    using Target = ToQ6K;
    static void put(const Tiles &to, const uint8_t *block, int64_t b, int r) {
        to.super_scales[b * LANES + r] = half(block + 108);
        for (int s = 0; s < 16; s++) {
            const int low = block[96 + s % 8] >> (s / 8 * 4) & 15, high = block[104 + s % 4] >> (s / 4 * 2) & 3;
            to.scales[(b * 16 + s) * LANES + r] = uint8_t((low | high << 4) - 32);
        }
        for (int j = 0; j < 8; j++) put_group(to, block, j, b * 8 + j, r);
    }
    static void put_group(const Tiles &to, const uint8_t *block, int j, int64_t g, int r) {
        const auto codes = [&](int i) {  // columns 4i .. 4i + 3, a byte each: no carry leaves a byte
            const uint32_t low = (word(block + 32 + j / 4 * 32 + 4 * i) >> (j % 4 * 2)) & PAIR;
            return low + (((word(block + 4 * i) >> j) & ONE) << 2) + 28 * ONE;
        };
        uint32_t *line = to.codes + g * WORDS_4 + r;
        for (int i = 0; i < 4; i++) line[i * LANES] = (codes(i) & LOW) | (codes(4 + i) & LOW) << 4;
        put_pairs(to.high_codes + g * WORDS_2 + r, [&](int i) { return (codes(i) >> 4) & PAIR; });
    }
};

}  // namespace

MAX_RAY_TILE(q5_0, Q5_0)
MAX_RAY_TILE(q5_1, Q5_1)
MAX_RAY_TILE(q2_k, Q2_K)
MAX_RAY_TILE(q3_k, Q3_K)
MAX_RAY_TILE(iq4_nl, IQ4_NL)
MAX_RAY_TILE(iq4_xs, IQ4_XS)
MAX_RAY_TILE(mxfp4, MXFP4)

// Weights of linear layers as they are packed, and a finished row of outputs.
//
// Packed layout, outputs N in panels of 16 (the last one padded with zeros), inputs K padded with a zero to an even number:
//
//     float   [panel][k][16]             one float a weight
//     bf16    [panel][k / 2][16]         one 32-bit word a pair of weights: k even in the low half, k odd in the high one
//     f16     [panel][k / 2][2][16]      one half a weight: those of k even, then those of k odd
#pragma once
#include "vec.h"
#include <algorithm>

constexpr int PANEL = LANES;
constexpr int GROUP = 4;  // panels that a thread takes at once
constexpr int WIDTH = GROUP * PANEL;

template <class T> struct Packed;

template <> struct Packed<float> {
    static int64_t panel_words(int64_t K) { return K * PANEL; }
    typedef float Word;
    // The weights of a pair of inputs, 16 outputs each.
    static inline void widen(const float *panel, int64_t pair, f32x16 &even, f32x16 &odd) {
        even = load16(panel + pair * 2 * PANEL);
        odd = load16(panel + pair * 2 * PANEL + PANEL);
    }
};

template <> struct Packed<bf16> {
    static int64_t panel_words(int64_t K) { return K / 2 * PANEL; }
    typedef uint32_t Word;
    static inline void widen(const uint32_t *panel, int64_t pair, f32x16 &even, f32x16 &odd) {
        u32x16 both = *(const u32x16u *)(panel + pair * PANEL);
        even = (f32x16)(both << 16);
        odd = (f32x16)(both & 0xffff0000u);
    }
};

template <> struct Packed<f16> {
    static int64_t panel_words(int64_t K) { return K / 2 * PANEL; }
    typedef uint32_t Word;
    static inline void widen(const uint32_t *panel, int64_t pair, f32x16 &even, f32x16 &odd) {
        const f16 *both = (const f16 *)(panel + pair * PANEL);
        even = load16(both);
        odd = load16(both + PANEL);
    }
};

// How many panels of a group that begins at output n there are.
static inline int64_t panels_left(int64_t N, int64_t n) { return std::min<int64_t>(GROUP, (N - n + PANEL - 1) / PANEL); }

// One finished row of up to 64 outputs: bias, rounding, out.
template <class T> void write_row(const float *sums, const T *bias, T *y, int64_t count) {
    for (int64_t n = 0; n < count; n += LANES) {
        f32x16 value = *(const f32x16 *)(sums + n);
        int64_t left = count - n;
        if (left >= LANES) {
            if (bias) value = rounded<T>(value) + load16(bias + n);
            store16(y + n, value);
        } else {
            if (bias) value = rounded<T>(value) + load_part(bias + n, left);
            store_part(y + n, value, left);
        }
    }
}

// Online softmax in base 2, rescaled lazily, and its probabilities as A operands.
#pragma once

#include "attention.cuh"
#include "prefill_layout.cuh"

namespace volta {

// Probabilities are floats scaled by 2^-112, so that the low five bits of the exponent are already those of a
// half: eight times the bits, rounded, has the half in its upper 16 bits. This spares the conversion unit,
// which the exponentials need.
constexpr float HALF_BIAS = 112.0f;
// A row's reference may lag its maximum by 2^LAG; probabilities then reach at most 2^15 as halves.
constexpr float LAG = 4.0f;
constexpr float SHIFT = HALF_BIAS - (15.0f - LAG);
constexpr float TWO_TO_SHIFT = 0x1p101f;
constexpr float OUT_SCALE = 0x1p-112f;
static_assert(SHIFT == 101.0f, "TWO_TO_SHIFT is 2^SHIFT");
// Reference of a row that has seen no key.
constexpr float UNSEEN = ANYTHING ? -3.4e38f : -1e30f;
// Masks may hide a whole row behind finite values so large that a reference has no room for SHIFT.
constexpr float IN_REFERENCE = ANYTHING ? 0.0f : SHIFT;

using Scores = float[SCORE_ROWS][SCORE_COLS][8];
using Output = float[2][OUT_COLS][8];

// P = 2^(scale s - reference - (SHIFT - IN_REFERENCE)). `reference` is the same in every lane that holds the
// row, `sum` is of the lane's own columns. References are rounded up: however large the scores, P stays below
// 2^16 as a half. Up to scores of 2^28 rounding lifts them by less than 32, and the largest P is no denormal.
struct Softmax {
    float reference[ROWS];
    float sum[ROWS];
};

// Row, of those whose scores a lane holds, of accumulator element i of row tile m.
VOLTA_DEVICE constexpr int row_of(int m, int i) { return 2 * m + (i >> 1 & 1); }

// Per row, spread over the two row tiles of O: WIDE quadpairs score one of them and have the other from lane
// ^ 8.
VOLTA_DEVICE float of_output_row(const float (&x)[ROWS], int m, int i) {
    return WIDE ? (m == 0 ? x[i >> 1 & 1] : shuffle_xor(x[i >> 1 & 1], 8)) : x[row_of(m, i)];
}

VOLTA_DEVICE void row_maxima(float (&maximum)[ROWS], const Scores& s) {
#pragma unroll
    for (int m = 0; m < SCORE_ROWS; ++m) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
            for (int n = 0; n < SCORE_COLS; ++n) {
                float& top = maximum[row_of(m, i)];
                top = n == 0 && (i == 0 || i == 2) ? s[m][n][i] : fmaxf(top, s[m][n][i]);
            }
        }
    }
}

// Moves the references up to the new maxima. Rare after the first tile, because references may lag.
VOLTA_DEVICE void rescale(Softmax& softmax, Output& out, const float (&maximum)[ROWS], float scale) {
    float factor[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float top = fmaxf(maximum[r], shuffle_xor(maximum[r], 2));
        top = fmaxf(top, shuffle_xor(top, 4));
        const float next = fmaxf(softmax.reference[r], multiply_add_up(top, scale, IN_REFERENCE));
        factor[r] = exp2_approx(softmax.reference[r] - next);
        softmax.reference[r] = next;
        softmax.sum[r] *= factor[r];
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        const float of_row[2] = {of_output_row(factor, m, 0), of_output_row(factor, m, 2)};
#pragma unroll
        for (int n = 0; n < OUT_COLS; ++n) {
#pragma unroll
            for (int i = 0; i < 8; ++i) out[m][n][i] *= of_row[i >> 1 & 1];
        }
    }
}

// Scores to probabilities.
VOLTA_DEVICE void update(Softmax& softmax, Output& out, Scores& s, float scale) {
    float maximum[ROWS];
    row_maxima(maximum, s);
    bool above = false;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) above |= maximum[r] * scale - softmax.reference[r] > LAG - IN_REFERENCE;
    if (unlikely(any_lane(above))) rescale(softmax, out, maximum, scale);
#pragma unroll
    for (int m = 0; m < SCORE_ROWS; ++m) {
#pragma unroll
        for (int n = 0; n < SCORE_COLS; ++n) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int r = row_of(m, i);
                float exponent = s[m][n][i] * scale - softmax.reference[r];
                if (ANYTHING) exponent -= SHIFT;
                s[m][n][i] = exp2_approx(exponent);
                softmax.sum[r] += s[m][n][i];
            }
        }
    }
}

// The 8x8 accumulator tile as the two A operands of its columns 0..3 and 4..7.
struct Operand8 {
    Word2 k[2];
};

VOLTA_DEVICE u32 half_in_high_bits(float p) { return float_bits(p) * 8 + 0x8000; }

// Lanes l and l ^ 2 hold columns {0, 1} and {2, 3} of rows r and r + 2: one exchange gives each of them all
// four columns of the one row that it supplies to A.
VOLTA_DEVICE Operand8 to_operand(const float (&p)[8], bool odd) {
    Operand8 a;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const u32 upper = byte_permute(half_in_high_bits(p[4 * j]), half_in_high_bits(p[4 * j + 1]), 0x7632);
        const u32 lower =
            byte_permute(half_in_high_bits(p[4 * j + 2]), half_in_high_bits(p[4 * j + 3]), 0x7632);
        const u32 received = shuffle_xor(odd ? upper : lower, 2);
        a.k[j] = {odd ? received : upper, odd ? lower : received};
    }
    return a;
}

VOLTA_DEVICE Operand8 from_lane(const Operand8& a, u32 mask) {
    Operand8 r;
#pragma unroll
    for (int j = 0; j < 2; ++j) r.k[j] = {shuffle_xor(a.k[j].x, mask), shuffle_xor(a.k[j].y, mask)};
    return r;
}

}  // namespace volta

// Online softmax in base 2, rescaled lazily.
#pragma once

#include "prefill_fragments.cuh"

namespace volta {

constexpr float LOG2_E = 1.4426950408889634f;
// A row's reference may lag its maximum by 2^LAG; probabilities then reach at most 2^15 as halves.
constexpr float LAG = 4.0f;
constexpr float REFERENCE_SHIFT = HALF_EXPONENT_BIAS - (15.0f - LAG);
constexpr float UNSEEN = -1.0e30f;  // reference of a row that has seen no key

// P = 2^(scale s - reference). `reference` is a lagging row maximum plus REFERENCE_SHIFT, the same in every lane
// that holds the row; `sum` is of this thread's own columns.
struct Softmax {
    float reference[ROWS];
    float sum[ROWS];

    VOLTA_DEVICE void start() {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) reference[r] = UNSEEN, sum[r] = 0.0f;
    }
};

using Scores = float[SCORE_ROWS][SCORE_COLS][8];
using Output = float[2][OUT_COLS][8];

VOLTA_DEVICE constexpr int row_of(int m, int i) { return 2 * m + (i >> 1 & 1); }

VOLTA_DEVICE void row_maxima(const Scores& s, float (&maximum)[ROWS]) {
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

// Moves the references up to the new maxima; rare, because references may lag.
VOLTA_DEVICE void rescale(Softmax& softmax, Output& out, const float (&maximum)[ROWS], float scale) {
    float factor[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float top = fmaxf(maximum[r], shuffle_xor(maximum[r], 2));
        top = fmaxf(top, shuffle_xor(top, 4));
        float next = fmaxf(softmax.reference[r], top * scale + REFERENCE_SHIFT);
        factor[r] = exp2_approx(softmax.reference[r] - next);
        softmax.reference[r] = next;
        softmax.sum[r] *= factor[r];
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        float pair[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            pair[h] = WIDE ? (m == 0 ? factor[h] : shuffle_xor(factor[h], 8)) : factor[row_of(m, 2 * h)];
        }
#pragma unroll
        for (int n = 0; n < OUT_COLS; ++n) {
#pragma unroll
            for (int i = 0; i < 8; ++i) out[m][n][i] *= pair[i >> 1 & 1];
        }
    }
}

VOLTA_DEVICE void update(Softmax& softmax, Output& out, Scores& s, float scale) {
    float maximum[ROWS];
    row_maxima(s, maximum);
    bool above = false;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        above |= maximum[r] * scale - softmax.reference[r] > LAG - REFERENCE_SHIFT;
    }
    if (__builtin_expect(any_lane(above), 0)) rescale(softmax, out, maximum, scale);
#pragma unroll
    for (int m = 0; m < SCORE_ROWS; ++m) {
#pragma unroll
        for (int n = 0; n < SCORE_COLS; ++n) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int r = row_of(m, i);
                s[m][n][i] = exp2_approx(s[m][n][i] * scale - softmax.reference[r]);
                softmax.sum[r] += s[m][n][i];
            }
        }
    }
}

}  // namespace volta

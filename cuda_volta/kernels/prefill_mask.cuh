// What happens to scores before the softmax: softcap, ALiBi, masks and bounds.
#pragma once

#include "prefill_softmax.cuh"

namespace volta {

// Where a lane's scores lie: rows in the sequence, columns in the tile.
VOLTA_DEVICE i32 score_row(const Lane& lane, i32 query0, int r) {
    return query0 + static_cast<i32>(tile_row(lane, r >> 1) + 4 * lane.high + (lane.low & 1)) + 2 * (r & 1);
}
VOLTA_DEVICE i32 first_column(const Lane& lane) { return static_cast<i32>(8 * lane.side + (lane.low & 2)); }
VOLTA_DEVICE constexpr int column_of(int n, int i) { return 16 * n + (i & 5); }

// Hides the keys outside of each row's band.
VOLTA_DEVICE void apply_band(Scores& s, const AttentionParams& p, const Sequence& sequence, const Lane& lane,
                             i32 query0, i32 key0) {
    u32 visible[ROWS];  // bit c: column first_column + c
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const Band band = visible_band(p, sequence, score_row(lane, query0, r));
        const i32 first = clamp(band.first - key0, 0, BLOCK_K), last = clamp(band.last - key0, -1, BLOCK_K - 1);
        visible[r] = first > last ? 0 : (0xffffffffu << first & 0xffffffffu >> (31 - last)) >> first_column(lane);
    }
#pragma unroll
    for (int m = 0; m < SCORE_ROWS; ++m) {
#pragma unroll
        for (int n = 0; n < SCORE_COLS; ++n) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (!(visible[row_of(m, i)] >> column_of(n, i) & 1)) s[m][n][i] = -infinity();
            }
        }
    }
}

// Softcap and ALiBi, then the mask. Leaves scores such that `scale` times them are logits in base 2.
struct ScoreRules {
    float scale;         // of the scores as they will be left
    float cap_exponent;  // 2^(cap_exponent s) = e^(2 scale s / softcap)
    float cap;           // in base 2
    float slope;         // in units of the scores as they will be left

    VOLTA_DEVICE ScoreRules(const AttentionParams& p, float logit_scale, u32 batch, u32 head)
        : scale(logit_scale), cap_exponent(0.0f), cap(p.softcap * LOG2_E), slope(0.0f) {
        if (!SCORES) return;
        if (cap > 0.0f) cap_exponent = 2.0f * LOG2_E * logit_scale / cap;
        if (cap > 0.0f || ANYTHING) scale = 1.0f;
        if (p.alibi_slopes) {
            slope = ldg(p.alibi_slopes + static_cast<i64>(batch) * p.alibi_batch + head) * LOG2_E / scale;
        }
    }

    VOLTA_DEVICE void apply(Scores& s, const AttentionParams& p, const Sequence& sequence, const Lane& lane,
                            float logit_scale, u32 batch, u32 head, i32 query0, i32 key0) const {
        if (!SCORES) return;
        if (cap > 0.0f) {
#pragma unroll
            for (int e = 0; e < SCORE_ROWS * SCORE_COLS * 8; ++e) {
                float& x = s[e / 8 / SCORE_COLS][e / 8 % SCORE_COLS][e % 8];
                x = cap - 2.0f * cap * rcp_approx(exp2_approx(x * cap_exponent) + 1.0f);
            }
        } else if (ANYTHING) {
#pragma unroll
            for (int e = 0; e < SCORE_ROWS * SCORE_COLS * 8; ++e) {
                s[e / 8 / SCORE_COLS][e / 8 % SCORE_COLS][e % 8] *= logit_scale;
            }
        }
        if (p.alibi_slopes) {
            const float distance = static_cast<float>(score_row(lane, query0, 0) + sequence.shift - key0 -
                                                      first_column(lane));
#pragma unroll
            for (int m = 0; m < SCORE_ROWS; ++m) {
#pragma unroll
                for (int n = 0; n < SCORE_COLS; ++n) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const float apart = static_cast<float>(8 * m + (i & 2) - column_of(n, i));
                        s[m][n][i] -= slope * fabsf(distance + apart);
                    }
                }
            }
        }
        if (ANYTHING && p.mask_kind != MASK_NONE) {
#pragma unroll
            for (int m = 0; m < SCORE_ROWS; ++m) {
#pragma unroll
                for (int n = 0; n < SCORE_COLS; ++n) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const i32 row = clamp(score_row(lane, query0, row_of(m, i)), 0, sequence.q_len - 1);
                        const i32 key = clamp(key0 + first_column(lane) + column_of(n, i), 0, sequence.k_len - 1);
                        s[m][n][i] += mask_bias(p, sequence, batch, head, row, key);
                    }
                }
            }
        }
    }
};

}  // namespace volta

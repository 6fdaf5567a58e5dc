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
    static_assert(BLOCK_K == 32, "a tile's columns are the bits of a word");
    u32 visible[ROWS];  // bit c: column first_column + c
    const i32 position = score_row(lane, query0, 0) + sequence.shift - key0;
    const i32 left = p.left == NO_BOUND ? FAR : p.left, right = p.right == NO_BOUND ? FAR : p.right;
    const i32 end = clamp(sequence.k_len - key0, 0, BLOCK_K) - 1;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const i32 row = 8 * (r >> 1) + 2 * (r & 1);
        const i32 first = position + row - left, last = position + row + right;
        visible[r] = shift_left(0xffffffffu, first > 0 ? first : 0);
        visible[r] &= shift_right(0xffffffffu, 31 - (last < end ? last : end));
        visible[r] >>= first_column(lane);
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

// Softcap, ALiBi and attn_mask.
struct ScoreRules {
    float scale;  // base-2 logits are this times what `apply` leaves, plus `offset`
    float offset;
    float cap;           // in base 2
    float cap_exponent;  // SOFTCAP_ALONE: 2^(cap_exponent s) = e^(-2 scale s / softcap)
    float slope;         // in units of what `apply` leaves

    VOLTA_DEVICE ScoreRules(const AttentionParams& p, float logit_scale, u32 batch, u32 head)
        : scale(logit_scale), offset(0.0f), cap(p.softcap * LOG2_E), cap_exponent(0.0f), slope(0.0f) {
        if (SOFTCAP_ALONE) {
            cap_exponent = -2.0f * LOG2_E * logit_scale / cap;
            scale = 2.0f * cap;
            offset = -cap;
        }
        if (ANYTHING) scale = 1.0f;
        if (ALIBI && p.alibi_slopes) {
            slope = ldg(p.alibi_slopes + static_cast<i64>(batch) * p.alibi_batch + head) * LOG2_E / scale;
        }
    }

    // softcap tanh(x / softcap) = 2 softcap r - softcap, r = 1 / (e^(-2 x / softcap) + 1). Where nothing else
    // joins in, the scores become r, and `scale` and `offset` do the rest.
    VOLTA_DEVICE float capped(float s, float logit_scale) const {
        if (SOFTCAP_ALONE) return rcp_approx(exp2_approx(s * cap_exponent) + 1.0f);
        return soft_cap(s * logit_scale, cap, rcp_approx(cap));
    }

    VOLTA_DEVICE void apply(Scores& s, const AttentionParams& p, const Sequence& sequence, const Lane& lane,
                            float logit_scale, u32 batch, u32 head, i32 query0, i32 key0) const {
        const i32 column0 = key0 + first_column(lane);
        const float distance = static_cast<float>(score_row(lane, query0, 0) + sequence.shift - column0);
#pragma unroll
        for (int m = 0; m < SCORE_ROWS; ++m) {
#pragma unroll
            for (int n = 0; n < SCORE_COLS; ++n) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float& x = s[m][n][i];
                    if (SOFTCAP_ALONE || (ANYTHING && cap > 0.0f))
                        x = capped(x, logit_scale);
                    else if (ANYTHING)
                        x *= logit_scale;
                    if (ALIBI)
                        x -= slope * fabsf(distance + static_cast<float>(8 * m + (i & 2) - column_of(n, i)));
                }
            }
        }
        if (ANYTHING && p.mask_kind != MASK_NONE)
            apply_mask(s, p, sequence, lane, batch, head, query0, column0);
    }

    // Rows and keys past the end read the last one's mask.
    VOLTA_DEVICE static void apply_mask(Scores& s, const AttentionParams& p, const Sequence& sequence,
                                        const Lane& lane, u32 batch, u32 head, i32 query0, i32 column0) {
        const i64 first = batch * p.mask_batch + head * p.mask_head + sequence.k_begin * p.mask_key;
#pragma unroll
        for (int n = 0; n < SCORE_COLS; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int element = (c & 1) | (c & 2) << 1;
                const i32 key = clamp(column0 + column_of(n, element), 0, sequence.k_len - 1);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const i32 row = clamp(score_row(lane, query0, r), 0, sequence.q_len - 1);
                    s[r >> 1][n][element | (r & 1) << 1] +=
                        mask_value(p, first + row * p.mask_row + key * p.mask_key);
                }
            }
        }
    }
};

}  // namespace volta

// The online softmax of a warp's 16 packed rows (FlashAttention-2, algorithm 1), base 2.
#pragma once

#include "attention.cuh"
#include "quadpair.cuh"

namespace volta {

// Row r of a KV head's queries: query r / group of query head kv_head * group + r % group.
struct PackedRow {
    i32 query, head;
};

// One of the four rows whose accumulators a lane holds.
struct LaneRow {
    Band band;  // empty where the row does not exist
    i32 query, head, position;
    float slope;  // of ALiBi, base 2
    float max, sum;
};
struct LaneRows {
    LaneRow at[2][2];
};

VOLTA_DEVICE void start_row(LaneRow& row, const AttentionParams& p, const Sequence& s, i32 b, PackedRow at, bool exists) {
    row.band = exists ? visible_band(p, s, at.query) : Band{0, -1};
    row.query = at.query;
    row.head = at.head;
    row.position = at.query + s.shift;
    row.slope = exists && p.alibi_slopes ? ldg(p.alibi_slopes + b * p.alibi_batch + at.head) * LOG2_E : 0.0f;
    row.max = -INFINITE;
    row.sum = 0.0f;
}

// From q k to a score, base 2.
struct ScoreScale {
    float plain;             // without a cap
    float inner, cap, inverse_cap;
};
VOLTA_DEVICE ScoreScale score_scale(const AttentionParams& p, i32 kv_head) {
    const float inner = p.k_scale ? p.scale * ldg(p.k_scale + kv_head) : p.scale;
    return {inner * LOG2_E, inner, p.softcap, p.softcap != 0.0f ? 1.0f / p.softcap : 0.0f};
}

// Scores of 8 rows and 8 GROUPS keys, still partial sums of each quadpair, to probabilities of each row's
// maximum so far; `rescale` brings what was summed before to it.
template <int GROUPS>
VOLTA_DEVICE void online_softmax(float (&s)[GROUPS][8], LaneRow (&rows)[2], float (&rescale)[2],
                                 const ScoreScale& scale, const AttentionParams& p, const Sequence& seq, i32 b,
                                 i32 tile) {
    const u32 lane = lane_index();
    float top[2] = {rows[0].max, rows[1].max};
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float x = s[g][i];
            x += shuffle_xor(x, 4);
            x += shuffle_xor(x, 8);
            const LaneRow& row = rows[i >> 1 & 1];
            const i32 j = tile + g * 8 + static_cast<i32>(accumulator_column(lane, i));
            if (p.softcap != 0.0f) {
                x = soft_cap(x * scale.inner, scale.cap, scale.inverse_cap) * LOG2_E;
            } else {
                x *= scale.plain;
            }
            const i32 distance = row.position - j;
            x -= row.slope * static_cast<float>(distance < 0 ? -distance : distance);
            const bool seen = j >= row.band.first && j <= row.band.last;
            if (p.mask_kind != MASK_NONE && seen) x += mask_bias(p, seq, b, row.head, row.query, j);
            x = seen ? x : -INFINITE;
            s[g][i] = x;
            top[i >> 1 & 1] = x > top[i >> 1 & 1] ? x : top[i >> 1 & 1];
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        top[r] = row_max(top[r]);
        const float base = top[r] == -INFINITE ? 0.0f : top[r];
        rescale[r] = exp2_approx(rows[r].max - base);
        rows[r].max = top[r];
        float sum = 0.0f;
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if ((i >> 1 & 1) != r) continue;
                s[g][i] = exp2_approx(s[g][i] - base);
                sum += s[g][i];
            }
        }
        rows[r].sum = rows[r].sum * rescale[r] + sum;
    }
}

}  // namespace volta

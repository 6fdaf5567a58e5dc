// The online softmax of a warp's 16 packed rows (FlashAttention-2, algorithm 1), base 2.
#pragma once

#include "attention.cuh"
#include "quadpair.cuh"

namespace volta {

// What all lanes of a block share: up to 16 packed rows of one KV head. Row r of a head is query r / group of
// query head kv_head * group + r % group.
struct Block {
    Sequence seq;
    i32 batch, kv_head, first_row, rows;
    i32 group;  // query heads of a KV head
};
struct PackedRow {
    i32 query, head;
};
VOLTA_DEVICE PackedRow packed_row(const Block& k, i32 row) {
    const i32 r = k.first_row + row;
    return {r / k.group, k.kv_head * k.group + r % k.group};
}

// One of the four rows whose accumulators a lane holds.
struct LaneRow {
    float max, sum;
};

// The rows' bands wait in shared memory: there are no registers to spare. Empty where a row does not exist.
VOLTA_DEVICE void store_band(const AttentionParams& p, const Block& k, u32 bands, i32 row) {
    const Band band = row < k.rows ? visible_band(p, k.seq, packed_row(k, row).query) : Band{0, -1};
    sts64(bands + row * 8, {static_cast<u32>(band.first), static_cast<u32>(band.last)});
}
VOLTA_DEVICE Band load_band(u32 bands, i32 row) {
    const Word2 band = lds64(bands + row * 8);
    return {static_cast<i32>(band.x), static_cast<i32>(band.y)};
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

// ALiBi and attn_mask, base 2, of scores of keys tile.. of packed row `row`.
template <int GROUPS>
VOLTA_DEVICE void add_biases(float (&s)[GROUPS][8], Band band, const AttentionParams& p, const Block& k, i32 row, int r,
                             i32 tile) {
    const PackedRow at = packed_row(k, row < k.rows ? row : 0);
    const float slope = p.alibi_slopes ? ldg(p.alibi_slopes + k.batch * p.alibi_batch + at.head) * LOG2_E : 0.0f;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if ((i >> 1 & 1) != r) continue;
            const i32 j = tile + g * 8 + static_cast<i32>(accumulator_column(lane_index(), i));
            if (j < band.first || j > band.last) continue;
            const i32 distance = at.query + k.seq.shift - j;
            s[g][i] -= slope * static_cast<float>(distance < 0 ? -distance : distance);
            if (p.mask_kind != MASK_NONE) s[g][i] += mask_bias(p, k.seq, k.batch, at.head, at.query, j);
        }
    }
}

// Scores of 8 rows (from row 8 m) and 8 GROUPS keys, still partial sums of each quadpair, become probabilities
// relative to each row's maximum so far; `rescale` brings what was summed before to that maximum.
template <int GROUPS>
VOLTA_DEVICE void online_softmax(float (&s)[GROUPS][8], LaneRow (&rows)[2], float (&rescale)[2],
                                 const ScoreScale& scale, const AttentionParams& p, const Block& k, u32 bands, int m,
                                 i32 tile) {
    const u32 lane = lane_index();
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float x = s[g][i];
            x += shuffle_xor(x, 4);
            x += shuffle_xor(x, 8);
            if (p.softcap != 0.0f) {
                s[g][i] = soft_cap(x * scale.inner, scale.cap, scale.inverse_cap) * LOG2_E;
            } else {
                s[g][i] = x * scale.plain;
            }
        }
    }
    float top[2] = {rows[0].max, rows[1].max};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const i32 row = m * 8 + static_cast<i32>(accumulator_row(lane, r));
        const Band band = load_band(bands, row);
        if (p.alibi_slopes || p.mask_kind != MASK_NONE) add_biases(s, band, p, k, row, r, tile);
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if ((i >> 1 & 1) != r) continue;
                const i32 j = tile + g * 8 + static_cast<i32>(accumulator_column(lane, i));
                if (j < band.first || j > band.last) s[g][i] = -infinity();
                top[r] = s[g][i] > top[r] ? s[g][i] : top[r];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        top[r] = row_max(top[r]);
        const float base = top[r] == -infinity() ? 0.0f : top[r];
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

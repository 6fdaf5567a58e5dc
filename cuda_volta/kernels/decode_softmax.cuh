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

// The rows' bands, up to the block's last key, wait in shared memory: there are no registers to spare. Empty
// where a row does not exist.
VOLTA_DEVICE void store_band(const AttentionParams& p, const Block& k, u32 bands, i32 row, i32 last) {
    Band band = row < k.rows ? visible_band(p, k.seq, packed_row(k, row).query) : Band{0, -1};
    if (band.last > last) band.last = last;
    sts64(bands + row * 8, {static_cast<u32>(band.first), static_cast<u32>(band.last)});
}
VOLTA_DEVICE Band load_band(u32 bands, u32 row) {
    const Word2 band = lds64(bands + row * 8);
    return {static_cast<i32>(band.x), static_cast<i32>(band.y)};
}

// From q k to a score, base 2; to one without the base where a cap comes between.
struct ScoreScale {
    float factor, cap, inverse_cap;
};
VOLTA_DEVICE ScoreScale score_scale(const AttentionParams& p, i32 kv_head) {
    const float scale = p.k_scale ? p.scale * ldg(p.k_scale + kv_head) : p.scale;
    if (p.softcap == 0.0f) return {scale * LOG2_E, 0.0f, 0.0f};
    return {scale, p.softcap, rcp_approx(p.softcap)};
}

// ALiBi and attn_mask reach a tile's scores through shared memory: a warp computes them key by key, in a loop
// that stays small, and reads masks in the order in which they are stored. Rows of 8 or 16 keys are dense,
// those of 32 keys 16 banks apart: neither the stores (whole rows) nor the loads (pairs of two neighbouring
// rows) meet a bank twice.
template <int BLOCK>
constexpr u32 BIAS_PITCH = BLOCK == 32 ? 48 : BLOCK;

template <int BLOCK>
VOLTA_DEVICE void store_biases(const AttentionParams& p, const Block& k, u32 biases, i32 tile) {
    warp_barrier();
#pragma unroll 1
    for (i32 unit = static_cast<i32>(lane_index()); unit < (k.rows > 8 ? 16 : 8) * BLOCK; unit += 32) {
        const i32 row = unit / BLOCK;
        const i32 j = tile + unit % BLOCK;
        float bias = 0.0f;
        if (row < k.rows && j < k.seq.k_len) {
            const PackedRow at = packed_row(k, row);
            const i32 distance = at.query + k.seq.shift - j;
            if (p.mask_kind != MASK_NONE) bias = mask_bias(p, k.seq, k.batch, at.head, at.query, j);
            if (p.alibi_slopes) {
                const float slope = ldg(p.alibi_slopes + k.batch * p.alibi_batch + at.head) * LOG2_E;
                bias -= slope * static_cast<float>(distance < 0 ? -distance : distance);
            }
        }
        sts32(biases + (row * BIAS_PITCH<BLOCK> + unit % BLOCK) * 4, float_bits(bias));
    }
    warp_barrier();
}

template <int GROUPS>
VOLTA_DEVICE void add_biases(float (&s)[GROUPS][8], u32 biases, int m) {
    const u32 lane = lane_index();
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            const u32 row = m * 8 + accumulator_row(lane, i >> 1 & 1);
            const u32 column = g * 8 + accumulator_column(lane, i);
            const Word2 bias = lds64(biases + (row * BIAS_PITCH<GROUPS * 8> + column) * 4);
            s[g][i] += bits_float(bias.x);
            s[g][i + 1] += bits_float(bias.y);
        }
    }
}

// The quadpairs' partial products of 8 rows and 8 GROUPS keys become scores, base 2.
template <int GROUPS>
VOLTA_DEVICE void scale_scores(float (&s)[GROUPS][8], const ScoreScale& scale) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            s[g][i] += shuffle_xor(s[g][i], 4);
            s[g][i] += shuffle_xor(s[g][i], 8);
            s[g][i] *= scale.factor;
        }
    }
    if (scale.cap == 0.0f) return;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int i = 0; i < 8; ++i) s[g][i] = soft_cap(s[g][i], scale.cap, scale.inverse_cap) * LOG2_E;
    }
}

// Scores of rows 8 m.. and keys tile.. that a row does not see become -inf.
template <int GROUPS>
VOLTA_DEVICE void hide_keys(float (&s)[GROUPS][8], u32 bands, int m, i32 tile) {
    const u32 lane = lane_index();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const Band band = load_band(bands, m * 8 + accumulator_row(lane, r));
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if ((i >> 1 & 1) != r) continue;
                const i32 j = tile + g * 8 + static_cast<i32>(accumulator_column(lane, i));
                if (j < band.first || j > band.last) s[g][i] = -infinity();
            }
        }
    }
}

// Scores become probabilities relative to each row's maximum so far; `rescale` brings what was summed before
// to that maximum.
template <int GROUPS>
VOLTA_DEVICE void online_softmax(float (&s)[GROUPS][8], LaneRow (&rows)[2], float (&rescale)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float top = rows[r].max;
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if ((i >> 1 & 1) == r) top = fmaxf(top, s[g][i]);
            }
        }
        top = row_max(top);
        const float base = top == -infinity() ? 0.0f : top;
        rescale[r] = exp2_approx(rows[r].max - base);
        rows[r].max = top;
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

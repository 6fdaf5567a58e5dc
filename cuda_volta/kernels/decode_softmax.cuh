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

// The tile of scores that a lane's quadpair keeps, of GROUPS tiles of 8 keys.
template <int GROUPS>
VOLTA_DEVICE u32 own_group() {
    return quadpair(lane_index()) * GROUPS / 4;
}

// ALiBi and attn_mask reach a tile's scores through shared memory: a warp computes them key by key, in a loop
// that stays small, and reads masks in the order in which they are stored. Rows of 8 or 16 keys are dense,
// those of 32 keys 4 banks apart: neither the stores (whole rows) nor the loads (pairs of columns of two
// neighbouring rows, of each quadpair's own keys) meet a bank twice.
template <int BLOCK>
constexpr u32 BIAS_PITCH = BLOCK == 32 ? 36 : BLOCK;

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
VOLTA_DEVICE void add_biases(float (&s)[8], u32 biases, int m) {
    const u32 lane = lane_index();
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        const u32 row = m * 8 + accumulator_row(lane, i >> 1 & 1);
        const u32 column = own_group<GROUPS>() * 8 + accumulator_column(lane, i);
        const Word2 bias = lds64(biases + (row * BIAS_PITCH<GROUPS * 8> + column) * 4);
        s[i] += bits_float(bias.x);
        s[i + 1] += bits_float(bias.y);
    }
}

// Adds two lanes' partial sums of two tiles: the lane with the bit `mask` keeps the second tile.
VOLTA_DEVICE float add_and_keep(float first, float second, u32 mask) {
    const bool keeps_second = lane_index() & mask;
    return (keeps_second ? second : first) + shuffle_xor(keeps_second ? first : second, mask);
}

// The quadpairs' partial products of 8 rows and GROUPS tiles of 8 keys become scores, base 2, of one tile
// each: those of `own_group`.
template <int GROUPS>
VOLTA_DEVICE void own_scores(float (&own)[8], const float (&s)[GROUPS][8], const ScoreScale& scale) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float x;
        if constexpr (GROUPS == 4) {
            x = add_and_keep(add_and_keep(s[0][i], s[2][i], 8), add_and_keep(s[1][i], s[3][i], 8), 4);
        } else if constexpr (GROUPS == 2) {
            x = add_and_keep(s[0][i], s[1][i], 8);
            x += shuffle_xor(x, 4);
        } else {
            x = s[0][i] + shuffle_xor(s[0][i], 8);
            x += shuffle_xor(x, 4);
        }
        own[i] = x * scale.factor;
    }
    if (scale.cap == 0.0f) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) own[i] = soft_cap(own[i], scale.cap, scale.inverse_cap) * LOG2_E;
}

// Scores of rows 8 m.. and keys tile.. that a row does not see become -inf.
template <int GROUPS>
VOLTA_DEVICE void hide_keys(float (&s)[8], u32 bands, int m, i32 tile) {
    const u32 lane = lane_index();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const Band band = load_band(bands, m * 8 + accumulator_row(lane, r));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if ((i >> 1 & 1) != r) continue;
            const i32 j = tile + static_cast<i32>(own_group<GROUPS>() * 8 + accumulator_column(lane, i));
            if (j < band.first || j > band.last) s[i] = -infinity();
        }
    }
}

// A row over all lanes that hold keys of it.
template <int GROUPS>
VOLTA_DEVICE float whole_row_sum(float x) {
    x = row_sum(x);
    if (GROUPS > 1) x += shuffle_xor(x, 8);
    if (GROUPS > 2) x += shuffle_xor(x, 4);
    return x;
}
template <int GROUPS>
VOLTA_DEVICE float whole_row_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 2));
    if (GROUPS > 1) x = fmaxf(x, shuffle_xor(x, 8));
    if (GROUPS > 2) x = fmaxf(x, shuffle_xor(x, 4));
    return x;
}

// Scores become probabilities relative to each row's maximum so far; `rescale` brings what was summed before
// to that maximum. Sums are a lane's own until the end.
template <int GROUPS>
VOLTA_DEVICE void online_softmax(float (&s)[8], LaneRow (&rows)[2], float (&rescale)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float here = fmaxf(fmaxf(s[2 * r], s[2 * r + 1]), fmaxf(s[2 * r + 4], s[2 * r + 5]));
        const float top = whole_row_max<GROUPS>(fmaxf(rows[r].max, here));
        const float base = top == -infinity() ? 0.0f : top;
        rescale[r] = exp2_approx(rows[r].max - base);
        rows[r].max = top;
        rows[r].sum *= rescale[r];
#pragma unroll
        for (int i = 2 * r; i < 8; i += i & 1 ? 3 : 1) {
            s[i] = exp2_approx(s[i] - base);
            rows[r].sum += s[i];
        }
    }
}

// The row operands of tile g, from the quadpair that keeps it.
template <int GROUPS>
VOLTA_DEVICE Word2 operand_of(Word2 own, int g) {
    if (GROUPS == 1) return own;
    const u32 lane = (lane_index() & 19) + static_cast<u32>(g) * (16 / GROUPS);
    return {shuffle(own.x, lane), shuffle(own.y, lane)};
}

}  // namespace volta

// Normalises O and writes it, with the log-sum-exp.
#pragma once

#include "prefill_mask.cuh"
#include "prefill_tiles.cuh"
#include "quadpair.cuh"

namespace volta {

VOLTA_DEVICE void store_halves(u16* row, u32 column, const u32* words, int count, i32 width, bool aligned) {
    if (aligned) {
        if (static_cast<i32>(column) >= width) return;
        if (count == 4)
            stg(reinterpret_cast<Word4*>(row + column), Word4{words[0], words[1], words[2], words[3]});
        if (count == 2) stg(reinterpret_cast<Word2*>(row + column), Word2{words[0], words[1]});
        return;
    }
#pragma unroll
    for (int i = 0; i < 2 * count; ++i) {
        if (static_cast<i32>(column) + i < width)
            stg(row + column + i, static_cast<u16>(words[i / 2] >> 16 * (i & 1)));
    }
}

// One row tile: 4 consecutive columns of a row reach each lane, 8 of two column tiles that shared a chunk of
// V.
VOLTA_DEVICE void store_tile_rows(const float (&out)[OUT_COLS][8], const float (&factor)[2], const Lane& lane,
                                  u16* row, bool inside, i32 width, bool aligned) {
#pragma unroll
    for (int j = 0; j < (OUT_COLS + 1) / 2; ++j) {
        const bool single = 2 * j + 1 == OUT_COLS;
        Word2 a[2][2] = {};
#pragma unroll
        for (int t = 0; t < (single ? 1 : 2); ++t) {
            float x[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = out[2 * j + t][i] * factor[i >> 1 & 1];
            row_operands(a[t], x);
        }
#pragma unroll
        for (u32 high = 0; high < 2; ++high) {
            const u32 chunk = single ? last_value_chunk(lane, high) : value_chunk(lane, high, j);
            const u32 words[4] = {a[0][high].x, a[0][high].y, a[1][high].x, a[1][high].y};
            if (inside)
                store_halves(row, 8 * chunk + (single ? 4 * lane.other : 0), words, single ? 2 : 4, width,
                             aligned);
        }
    }
}

// A sink is one more term of the denominator. Rows that saw no key are zero, with lse -inf or the sink.
VOLTA_DEVICE void finish(const Softmax& softmax, const ScoreRules& rules, const Output& out,
                         const AttentionParams& p, const Lane& lane, u32 batch, u32 head, i32 query0) {
    const Sequence s = find_sequence(p, batch);  // again: nothing of it had to stay in registers
    float factor[ROWS];
    const float v_scale = p.v_scale ? ldg(p.v_scale + head / static_cast<u32>(p.heads / p.kv_heads)) : 1.0f;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float sum = row_sum(softmax.sum[r]);
        sum = (sum + shuffle_xor(sum, 4)) * TWO_TO_SHIFT;
        const float top = softmax.reference[r] - IN_REFERENCE + rules.offset;
        float lse = sum == 0.0f ? -infinity() : top + log2_approx(sum);
        if (p.sinks) {
            const float sink = ldg(p.sinks + head) * LOG2_E;
            sum += exp2_approx(sink - top);
            const float larger = fmaxf(lse, sink), smaller = fminf(lse, sink);
            if (smaller > -infinity())
                lse = larger + log2_approx(1.0f + exp2_approx(smaller - larger));
            else
                lse = larger;
        }
        factor[r] = sum == 0.0f ? 0.0f : OUT_SCALE * TWO_TO_SHIFT * v_scale * rcp_approx(sum);
        const i32 row = score_row(lane, query0, r);
        // Four lanes hold a row's sum.
        if (p.lse && row < s.q_len && lane.side == 0 && !lane.odd) {
            stg(p.lse + batch * p.lse_batch + head * p.lse_head + s.q_begin + row, lse * LN_2);
        }
    }
    const bool aligned = !ANYTHING || is_aligned(p.out, p.out_batch, p.out_row, p.out_head, p.v_head_dim);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        const float of_row[2] = {of_output_row(factor, m, 0), of_output_row(factor, m, 2)};
        const i32 row = query0 + static_cast<i32>(tile_row(lane, m) + 4 * lane.high + lane.low);
        u16* at =
            p.out + batch * p.out_batch + head * p.out_head + static_cast<i64>(s.q_begin + row) * p.out_row;
        store_tile_rows(out[m], of_row, lane, at, row < s.q_len, p.v_head_dim, aligned);
    }
}

}  // namespace volta

// The partial softmaxes of a block's warps become one, and leave as the result or as a split's part of it.
//
// Warps meet in shared memory 64 columns at a time. A row has MERGE_PITCH words; column c lies at word
// c ^ (c >> 5 << 2) of it. A 64-bit store of a half-warp (two rows 8 banks apart, four quadpairs 16 columns
// apart, column pairs 2 apart) and a 128-bit load of 8 lanes (half a row) then meet every bank once.
#pragma once

#include "decode_output.cuh"

namespace volta {

constexpr u32 MERGE_WARPS = 8;
constexpr u32 MERGE_PITCH = 72;
constexpr u32 MERGE_STATS = MERGE_WARPS * 16 * 8;  // (maximum, sum) of every warp's rows, before the columns

VOLTA_DEVICE u32 merge_word(u32 row, u32 column) { return row * MERGE_PITCH + (column ^ (column >> 5 << 2)); }

// Maximum and sum of a row over all warps. A maximum of -inf has a sum of 0, or NaN, which stays.
VOLTA_DEVICE RowTotal merge_stats(u32 base, u32 row) {
    RowTotal total{-infinity(), 0.0f};
#pragma unroll
    for (u32 w = 0; w < MERGE_WARPS; ++w) {
        const float x = bits_float(lds32(base + (w * 16 + row) * 8));
        total.max = x > total.max ? x : total.max;
    }
#pragma unroll
    for (u32 w = 0; w < MERGE_WARPS; ++w) {
        const Word2 x = lds64(base + (w * 16 + row) * 8);
        const bool finite = bits_float(x.x) > -infinity();
        total.sum += bits_float(x.y) * (finite ? exp2_approx(bits_float(x.x) - total.max) : 1.0f);
    }
    return total;
}

// Adds up the warps' outputs, rows and columns over the block's 256 threads: a thread gets 4 columns of row
// thread / 16 in each chunk of 64, through `use(chunk, values)`.
template <int V_CHUNKS, typename Use>
VOLTA_DEVICE void merge_outputs(float (&o)[2][V_CHUNKS][2][8], const LaneRow (&rows)[2][2], u32 base,
                                bool second, bool mine, Use use) {
    const u32 lane = lane_index();
    const u32 columns = base + MERGE_STATS;
    float factor[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const RowTotal total = merge_stats(base, m * 8 + accumulator_row(lane, r));
            const bool empty = total.max == -infinity();
            factor[m][r] = empty ? 0.0f : exp2_approx(rows[m][r].max - total.max) * rcp_approx(total.sum);
        }
    }
#pragma unroll
    for (int c = 0; c < V_CHUNKS; ++c) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            if (m == 1 && !second) continue;
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    const u32 row = warp_index() * 16 + m * 8 + accumulator_row(lane, i >> 1 & 1);
                    const u32 column = quadpair(lane) * 16 + (i >> 2) * 8 + t * 4 + (lane & 2);
                    const float f = factor[m][i >> 1 & 1];
                    sts64(columns + merge_word(row, column) * 4,
                          {float_bits(o[m][c][t][i] * f), float_bits(o[m][c][t][i + 1] * f)});
                }
            }
        }
        barrier();
        if (mine) {
            float sum[4] = {};
#pragma unroll
            for (u32 w = 0; w < MERGE_WARPS; ++w) {
                const u32 word = merge_word(w * 16 + thread_index() / 16, thread_index() % 16 * 4);
                const Word4 x = lds128(columns + word * 4);
                sum[0] += bits_float(x.x);
                sum[1] += bits_float(x.y);
                sum[2] += bits_float(x.z);
                sum[3] += bits_float(x.w);
            }
            use(c, sum);
        }
        barrier();
    }
}

}  // namespace volta

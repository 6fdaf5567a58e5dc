// Which keys a query sees.
#pragma once

#include "prefill_sequence.cuh"
#include "prefill_softmax.cuh"

namespace volta {
VOLTA_DEVICE void mask(Scores& s, const PrefillParams& p, const Sequence& q, const Lane& lane, i32 key0) {
    i32 query0 = block_x() * BLOCK_Q + warp_index() * WARP_ROWS;
#pragma unroll
    for (int m = 0; m < SCORE_ROWS; ++m) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            i32 row = static_cast<i32>(tile_row(lane, m) + 4 * lane.high + (lane.low & 1)) + 2 * pair;
            Span span(p, q, query0 + row);
            i32 first = span.last < span.first ? 0x7fffffff : span.first - key0;
            u32 width = span.last < span.first ? 0 : span.last - span.first;
#pragma unroll
            for (int n = 0; n < SCORE_COLS; ++n) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    int i = (c & 1) | (c & 2) << 1 | pair << 1;
                    i32 column = static_cast<i32>(8 * lane.side + (lane.low & 2)) + 16 * n + (i & 5);
                    if (static_cast<u32>(column - first) > width) s[m][n][i] = bits_float(0xff800000u);
                }
            }
        }
    }
}
}  // namespace volta

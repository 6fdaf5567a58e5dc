// Q of one warp, read once: into shared memory in the order of its fragments, and into registers.
#pragma once

#include "prefill_products.cuh"
#include "prefill_tiles.cuh"

namespace volta {

// `negate`: a negative scale moves into Q, so that a row's largest product is its largest score.
VOLTA_DEVICE void load_queries(Queries& q, const AttentionParams& p, const Sequence& s, const Lane& lane,
                               u32 batch, u32 head, i32 query0, bool negate) {
    const bool aligned = !ANYTHING || is_aligned(p.q, p.q_batch, p.q_row, p.q_head, p.head_dim);
    const u32 sign = negate ? 0x80008000u : 0;
    const u16* rows[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        const i32 row = query0 + static_cast<i32>(tile_row(lane, m) + 4 * lane.high + lane.low);
        rows[m] =
            p.q + batch * p.q_batch + head * p.q_head + (s.q_begin + clamp(row, 0, s.q_len - 1)) * p.q_row;
    }
    // Lanes of both sides need the same fragments: each brings one row tile of them.
    const u16* row = lane.side ? rows[1] : rows[0];
#pragma unroll 4
    for (int step = 0; step < SHARED_STEPS; ++step) {
        const Word4 w = load_chunk(row, query_chunk(lane, step), p.head_dim, aligned);
        sts128(q.at + 512 * static_cast<u32>(step) + 64 * lane.side,
               {w.x ^ sign, w.y ^ sign, w.z ^ sign, w.w ^ sign});
    }
#pragma unroll
    for (int u = 0; u < HELD; ++u) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const Word4 w = load_chunk(rows[m], query_chunk(lane, SHARED_STEPS + u), p.head_dim, aligned);
            q.held[u][m] = {w.x ^ sign, w.y ^ sign, w.z ^ sign, w.w ^ sign};
        }
    }
}

}  // namespace volta

// Which tiles of keys a block of queries visits.
#pragma once

#include "attention.cuh"
#include "prefill_layout.cuh"

namespace volta {

// Softmax does not mind the order of keys: tiles that a bound crosses come first, in a loop with a mask, and
// the loop over the others needs none. The variant for anything has only the first.
struct TileRange {
    i32 first, inner_first, inner_last;  // tiles
    i32 edges, count;

    VOLTA_DEVICE TileRange(const AttentionParams& p, const Sequence& s, i32 query0) {
        const Band top = visible_band(p, s, query0);
        const Band bottom = visible_band(p, s, clamp(query0 + BLOCK_Q - 1, 0, s.q_len - 1));
        first = top.first / BLOCK_K;
        const i32 end = bottom.last < top.first ? first : bottom.last / BLOCK_K + 1;
        inner_first = clamp((bottom.first + BLOCK_K - 1) / BLOCK_K, first, end);
        inner_last = clamp((top.last + 1) / BLOCK_K, inner_first, end);
        count = end - first;
        if (ANYTHING) inner_last = inner_first;
        edges = count - (inner_last - inner_first);
    }

    // First key of the i-th tile visited.
    VOLTA_DEVICE i32 key(i32 i) const {
        const i32 left = inner_first - first;
        const i32 tile = i < left ? first + i : i < edges ? inner_last + i - left : inner_first + i - edges;
        return tile * BLOCK_K;
    }
};

}  // namespace volta

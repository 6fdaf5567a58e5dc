// Which tiles of keys a block of queries visits, and what of each a warp's rows see.
#pragma once

#include "attention.cuh"
#include "prefill_layout.cuh"

namespace volta {

// The tiles that a block passes: from the last key that some row sees down to the first. Under a causal bound
// the nearest keys, to which ALiBi gives most weight, then come first, and O is hardly ever rescaled.
struct TileRange {
    i32 last, first;  // their first keys; none where last < first

    VOLTA_DEVICE TileRange(const AttentionParams& p, const Sequence& s, i32 query0) {
        const Band top = visible_band(p, s, query0);
        const Band bottom = visible_band(p, s, clamp(query0 + BLOCK_Q - 1, 0, s.q_len - 1));
        first = top.first / BLOCK_K * BLOCK_K;
        last = bottom.last < top.first ? first - BLOCK_K : bottom.last / BLOCK_K * BLOCK_K;
    }
};

// How the rows of one warp see a tile. Tiles whose first key lies in [low, high] are seen whole by all rows,
// those more than MARGIN outside by none: bounds move by one key a row, and tiles are BLOCK_K wide. Rows past
// the last query see nothing.
struct Visibility {
    static constexpr i32 MARGIN = WARP_ROWS + BLOCK_K - 2;
    i32 low, high;

    VOLTA_DEVICE Visibility(const AttentionParams& p, const Sequence& s, i32 query0) {
        const i32 position = query0 + s.shift, whole_end = s.k_len - BLOCK_K;
        const i32 from = p.left == NO_BOUND ? 0 : position + WARP_ROWS - 1 - p.left;
        const i32 to = p.right == NO_BOUND ? whole_end : position + p.right - (BLOCK_K - 1);
        low = static_cast<i32>(uniform(static_cast<u32>(from)));
        const i32 bound = to < whole_end ? to : whole_end;
        high = static_cast<i32>(uniform(static_cast<u32>(query0 < s.q_len ? bound : -1 - MARGIN)));
    }

    VOLTA_DEVICE bool whole(i32 key0) const { return key0 >= low && key0 <= high; }
    VOLTA_DEVICE bool nothing(i32 key0) const { return key0 < low - MARGIN || key0 > high + MARGIN; }
};

}  // namespace volta

// Which lane holds which element of m8n8k4's operands (PTX ISA, "Matrix Fragments for mma.m8n8k4").
//
// A quadpair is lanes 4q..4q+3 and 16+4q..19+4q. Row operands A (8x4) and column operands B (4x8) keep 4
// consecutive k's of one row, or column, in a lane; row operands B keep 4 consecutive columns of one k.
// Accumulators: element i of a lane is (accumulator_row(lane, i >> 1 & 1), accumulator_column(lane, i)).
#pragma once

#include "primitives.cuh"

namespace volta {

VOLTA_DEVICE u32 quadpair(u32 lane) { return lane >> 2 & 3; }
VOLTA_DEVICE u32 operand_row(u32 lane) { return (lane & 3) + (lane >> 4) * 4; }
VOLTA_DEVICE u32 accumulator_row(u32 lane, u32 r) { return (lane & 1) + 2 * r + (lane >> 4) * 4; }
VOLTA_DEVICE u32 accumulator_column(u32 lane, u32 i) { return (i & 4) + (lane & 2) + (i & 1); }

// The sum of a row of an 8x8 tile of accumulators: lanes l and l ^ 2 share it.
VOLTA_DEVICE float row_sum(float x) { return x + shuffle_xor(x, 2); }

// An 8x8 tile of accumulators as two row operands of 4 columns, rounded to half. A lane has two rows of 4
// columns and needs all 8 of one row: it sends those of its partner's row to lane ^ 2.
VOLTA_DEVICE void row_operands(Word2 (&a)[2], const float (&s)[8]) {
    const bool upper = lane_index() & 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const u32 row0 = pack_half2(s[4 * j], s[4 * j + 1]);
        const u32 row1 = pack_half2(s[4 * j + 2], s[4 * j + 3]);
        const u32 kept = upper ? row1 : row0;
        const u32 got = shuffle_xor(upper ? row0 : row1, 2);
        a[j] = {upper ? got : kept, upper ? kept : got};
    }
}

}  // namespace volta

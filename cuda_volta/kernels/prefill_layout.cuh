// The shape of one prefill kernel and where its operand tiles lie: quadpairs, registers, shared memory.
// cuda_volta/README.md draws these layouts and derives that no access meets a bank conflict.
#pragma once

#include "primitives.cuh"

namespace volta {

// A block takes BLOCK_Q queries of one head and walks over tiles of BLOCK_K keys.
constexpr int BLOCK_Q = 128;
constexpr int BLOCK_K = 32;

// What a variant knows beside bounds, lengths and pages: 1 softcap, 2 ALiBi, 3 those and masks, odd head
// dims, rows that are not 16-byte aligned, pages of any stride.
constexpr bool ANYTHING = FEATURES == 3;
constexpr bool SOFTCAP_ALONE = FEATURES == 1;
constexpr bool ALIBI = FEATURES == 2 || ANYTHING;

// Up to 128 columns a warp holds 32 rows of O, two quadpairs by two. Above, 16 rows: its quadpairs split the
// columns of O four ways, and Q K^T two ways by keys and two ways along the head dimension.
constexpr bool WIDE = HEAD_DIM > 128 || ANYTHING;
constexpr int WARP_ROWS = WIDE ? 16 : 32;
constexpr int THREADS = BLOCK_Q / WARP_ROWS * 32;

// Q K^T takes steps of eight elements of the head dimension a quadpair. HELD of them keep Q in registers, the
// others go in trips of TRIP steps; O += P V goes at once (ROLL 0), or in trips of 16 (1) or 8 keys (2).
// Trips make the main loop's code fit into the instruction cache next to a sub-core, 12 KB. BLOCKS blocks share
// an SM, and its registers.
constexpr int STEPS = HEAD_DIM / (WIDE ? 16 : 8);
constexpr int SHARED_STEPS = STEPS - HELD;
static_assert(SHARED_STEPS % TRIP == 0, "steps are whole trips");
constexpr int SCORE_ROWS = WIDE ? 1 : 2;               // 8-row tiles of scores that a quadpair keeps
constexpr int SCORE_COLS = BLOCK_K / 16;               // 8-key tiles of scores of a quadpair
constexpr int OUT_COLS = HEAD_DIM / (WIDE ? 32 : 16);  // 8-column tiles of O of a quadpair
constexpr int ROWS = 2 * SCORE_ROWS;                   // rows whose scores a thread holds

// Shared memory: K tile, V tile, Q in the order of its fragments.
constexpr int PITCH = (2 * HEAD_DIM + 127) / 128 * 128;  // bytes of a row of K or V
constexpr int KV_BYTES = BLOCK_K * PITCH;
constexpr int Q_WARP_BYTES = 512 * SHARED_STEPS;

// What a lane is to m8n8k4: lanes 4q..4q+3 and 16+4q..19+4q are quadpair q.
struct Lane {
    u32 low;   // 0..3: row of A, column of B (with 4 high), or row of a row-major B
    u32 high;  // 0..1: the upper half of the quadpair
    u32 side;  // bit 0 of the quadpair: which 8 of 16 keys it scores; with `other`, which columns of O it has
    u32 other;  // bit 1: which 16 of 32 rows; WIDE: which half of the head dimension it sums
    bool odd;   // accumulator columns 2, 3, 6, 7 and not 0, 1, 4, 5

    VOLTA_DEVICE explicit Lane(u32 lane)
        : low(lane & 3), high(lane >> 4), side(lane >> 2 & 1), other(lane >> 3 & 1), odd(lane & 2) {}
};

// A 16-byte chunk of a row of K or V lies at chunk ^ swizzle(row).
VOLTA_DEVICE u32 swizzle(u32 row) { return (row & 3) | (row >> 1 & 4); }

// First row, within the warp's, of the lane's row tile m of O and Q. WIDE quadpairs that sum the upper half
// of the head dimension hold their two tiles the other way round, so that they send and keep the same
// registers.
VOLTA_DEVICE u32 tile_row(const Lane& lane, int m) {
    return WIDE ? 8 * (static_cast<u32>(m) ^ lane.other) : 16 * lane.other + 8 * static_cast<u32>(m);
}

// Q as row operand, in the order of its fragments: 512 bytes a step, row tiles 64 bytes apart.
VOLTA_DEVICE u32 query_offset(const Lane& lane) { return (2 * lane.other + lane.high) * 128 + 16 * lane.low; }
VOLTA_DEVICE u32 query_chunk(const Lane& lane, int step) {
    return WIDE ? 2 * static_cast<u32>(step) + lane.other : static_cast<u32>(step);
}

// K as column operand: byte offset, within the K tile, of the lane's row and its chunk of step 0.
VOLTA_DEVICE u32 key_offset(const Lane& lane) {
    u32 row = 8 * lane.side + 4 * lane.high + lane.low;
    u32 chunk = swizzle(row) ^ (WIDE ? lane.other : 0);
    return row * PITCH + 16 * chunk;
}

// V as row operand: 8 keys of the lane's own side, and the 16-byte chunk that holds its part of two column
// tiles.
VOLTA_DEVICE u32 value_chunk(const Lane& lane, u32 high, int pair) {
    return WIDE ? 8 * static_cast<u32>(pair) + 4 * high + 2 * lane.other + lane.side
                : 4 * static_cast<u32>(pair) + 2 * high + lane.side;
}
VOLTA_DEVICE u32 value_offset(const Lane& lane) {
    u32 row = 8 * lane.side + lane.low;
    return row * PITCH + 16 * (value_chunk(lane, lane.high, 0) ^ swizzle(row));
}
// A last, single column tile (WIDE, an odd number of them): 8 bytes of a chunk.
VOLTA_DEVICE u32 last_value_chunk(const Lane& lane, u32 high) {
    return 4 * (OUT_COLS - 1) + 2 * high + lane.side;
}
VOLTA_DEVICE u32 last_value_offset(const Lane& lane) {
    u32 row = 8 * lane.side + lane.low;
    return row * PITCH + 16 * (last_value_chunk(lane, lane.high) ^ swizzle(row)) + 8 * lane.other;
}

}  // namespace volta

// The two matrix products of a tile: S = Q K^T and O += P V.
#pragma once

#include "prefill_softmax.cuh"

namespace volta {

// Q of one warp: its first steps in shared memory, its last in registers.
struct Queries {
    u32 at;
    Word4 held[HELD ? HELD : 1][2];
};

VOLTA_DEVICE Word2 low_half_of(const Word4& w) { return {w.x, w.y}; }
VOLTA_DEVICE Word2 high_half_of(const Word4& w) { return {w.z, w.w}; }

// Sums of one quadpair: WIDE, of its half of the head dimension, for both row tiles.
using Products = float[2][SCORE_COLS][8];

// Eight elements of the head dimension.
VOLTA_DEVICE void multiply_step(Products& s, const Word4& q0, const Word4& q1, u32 key_address) {
    Word4 k[SCORE_COLS];
#pragma unroll
    for (int n = 0; n < SCORE_COLS; ++n) k[n] = lds128(key_address + static_cast<u32>(n * 16 * PITCH));
#pragma unroll
    for (int n = 0; n < SCORE_COLS; ++n) mma_rc(s[0][n], low_half_of(q0), low_half_of(k[n]));
#pragma unroll
    for (int n = 0; n < SCORE_COLS; ++n) mma_rc(s[1][n], low_half_of(q1), low_half_of(k[n]));
#pragma unroll
    for (int n = 0; n < SCORE_COLS; ++n) mma_rc(s[0][n], high_half_of(q0), high_half_of(k[n]));
#pragma unroll
    for (int n = 0; n < SCORE_COLS; ++n) mma_rc(s[1][n], high_half_of(q1), high_half_of(k[n]));
}

// Steps within 128 bytes of a key's row differ in address bits that the swizzle flips.
VOLTA_DEVICE u32 step_address(u32 key_base, int step) {
    const u32 offset = static_cast<u32>(step * (WIDE ? 32 : 16));
    return (key_base ^ offset % 128) + offset / 128 * 128;
}

VOLTA_DEVICE void clear(Products& sum) {
#pragma unroll
    for (int e = 0; e < 16 * SCORE_COLS; ++e) sum[e / 8 / SCORE_COLS][e / 8 % SCORE_COLS][e % 8] = 0.0f;
}

VOLTA_DEVICE void multiply_keys(Products& sum, const Queries& q, u32 key_base) {
    clear(sum);
#pragma unroll
    for (int u = 0; u < HELD; ++u) {
        multiply_step(sum, q.held[u][0], q.held[u][1], step_address(key_base, SHARED_STEPS + u));
    }
    constexpr u32 STEP_BYTES = WIDE ? 32 : 16;
    u32 at = q.at;
#pragma unroll 1
    for (u32 offset = 0; offset < SHARED_STEPS * STEP_BYTES; offset += TRIP * STEP_BYTES) {
        const u32 base = SHARED_STEPS * STEP_BYTES <= 128 ? key_base ^ offset
                                                          : (key_base ^ offset % 128) + offset / 128 * 128;
#pragma unroll
        for (int u = 0; u < TRIP; ++u) {
            multiply_step(sum, lds128(at + 512 * u), lds128(at + 512 * u + 64), step_address(base, u));
        }
        at += 512 * TRIP;
    }
}

// The scores that this quadpair keeps.
VOLTA_DEVICE void collect(Scores& s, const Products& sum) {
#pragma unroll
    for (int n = 0; n < SCORE_COLS; ++n) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (WIDE) {
                s[0][n][i] = sum[0][n][i] + shuffle_xor(sum[1][n][i], 8);
            } else {
#pragma unroll
                for (int m = 0; m < SCORE_ROWS; ++m) s[m][n][i] = sum[m][n][i];
            }
        }
    }
}

// Where a lane reads V, from the tile's start: 8 keys of its own side, 8 of the other, and so on. Crossing, 8
// rows away, flips the swizzle's third bit: 64 bytes, which is also the way from one pair of column tiles to
// the next (unless WIDE).
struct ValueOffsets {
    u32 pair, single, across;

    VOLTA_DEVICE explicit ValueOffsets(const Lane& lane)
        : pair(pin(value_offset(lane))),
          single(OUT_COLS % 2 ? pin(last_value_offset(lane)) : 0),
          across(pin(lane.side ? 0u - 8 * PITCH : 8 * PITCH)) {}

    VOLTA_DEVICE u32 of_pair(int j) const {
        return WIDE ? pair + 128 * j : (pair ^ static_cast<u32>(j % 2 * 64)) + j / 2 * 128;
    }
    VOLTA_DEVICE void cross() {
        pair = (pair ^ 64) + across;
        single = (single ^ 64) + across;
        across = 0u - across;
    }
    VOLTA_DEVICE void next() {
        pair += 16 * PITCH;
        single += 16 * PITCH;
    }
};

// O += P V for 8 keys.
VOLTA_DEVICE void multiply_values8(Output& out, const Operand8 (&a)[2], u32 tile, const ValueOffsets& at) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const u32 rows = tile + 4 * k * PITCH;
#pragma unroll
        for (int j = 0; j < OUT_COLS / 2; ++j) {
            const Word4 v = lds128(rows + at.of_pair(j));
#pragma unroll
            for (int m = 0; m < 2; ++m) mma_rr(out[m][2 * j], a[m].k[k], low_half_of(v));
#pragma unroll
            for (int m = 0; m < 2; ++m) mma_rr(out[m][2 * j + 1], a[m].k[k], high_half_of(v));
        }
        if (OUT_COLS % 2) {
            const Word2 v = lds64(rows + at.single);
#pragma unroll
            for (int m = 0; m < 2; ++m) mma_rr(out[m][OUT_COLS - 1], a[m].k[k], v);
        }
    }
}

VOLTA_DEVICE void multiply_values(Output& out, const Scores& p, u32 tile, ValueOffsets at, bool odd) {
    Operand8 own[SCORE_COLS][SCORE_ROWS];
#pragma unroll
    for (int t = 0; t < SCORE_COLS; ++t) {
#pragma unroll
        for (int m = 0; m < SCORE_ROWS; ++m) own[t][m] = to_operand(p[m][t], odd);
    }
#pragma unroll(ROLL == 0 ? SCORE_COLS : 1)
    for (int t = 0; t < SCORE_COLS; ++t) {
        Operand8 a[2] = {own[0][0], WIDE ? from_lane(own[0][0], 8) : own[0][SCORE_ROWS - 1]};
#pragma unroll(ROLL == 2 ? 1 : 2)
        for (int crossed = 0; crossed < 2; ++crossed) {
            multiply_values8(out, a, tile, at);
            a[0] = from_lane(a[0], 4);
            a[1] = from_lane(a[1], 4);
            at.cross();
        }
        at.next();
#pragma unroll
        for (int m = 0; m < SCORE_ROWS; ++m) own[0][m] = own[SCORE_COLS - 1][m];
    }
}

}  // namespace volta

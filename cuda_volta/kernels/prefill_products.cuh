// The two matrix products of a tile: S = Q K^T and O += P V.
#pragma once

#include "prefill_softmax.cuh"

namespace volta {

// Q of one warp: its first steps in shared memory, its last in registers.
struct Queries {
    u32 at;
    Word4 held[HELD_STEPS + 1][2];
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

// Steps of a 128-byte group of a key's row differ in address bits that the swizzle flips.
constexpr int GROUP_STEPS = WIDE ? 4 : 8;
VOLTA_DEVICE u32 step_address(u32 key_base, int step) {
    return (key_base ^ static_cast<u32>(step % GROUP_STEPS * (128 / GROUP_STEPS))) +
           static_cast<u32>(step / GROUP_STEPS * 128);
}

VOLTA_DEVICE void multiply_keys(Scores& s, const Queries& q, u32 key_base) {
    Products sum;
#pragma unroll
    for (int e = 0; e < 16 * SCORE_COLS; ++e) sum[e / 8 / SCORE_COLS][e / 8 % SCORE_COLS][e % 8] = 0.0f;
    constexpr int TRIPS = SHARED_STEPS / GROUP_STEPS;
    u32 at = q.at, group = key_base;
#pragma unroll 1
    for (int trip = 0; trip < TRIPS; ++trip) {
#pragma unroll
        for (int u = 0; u < GROUP_STEPS; ++u) {
            multiply_step(sum, lds128(at + 512 * u), lds128(at + 512 * u + 64), step_address(group, u));
        }
        at += 512 * GROUP_STEPS;
        group += 128;
    }
#pragma unroll
    for (int u = TRIPS * GROUP_STEPS; u < SHARED_STEPS; ++u) {
        const u32 q_at = q.at + static_cast<u32>(512 * u);
        multiply_step(sum, lds128(q_at), lds128(q_at + 64), step_address(key_base, u));
    }
#pragma unroll
    for (int u = 0; u < HELD_STEPS; ++u) {
        multiply_step(sum, q.held[u][0], q.held[u][1], step_address(key_base, SHARED_STEPS + u));
    }
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

// Where a lane reads V, from the tile's start. Crossing to the keys of the other side, 8 rows away, flips the
// swizzle's third bit: 64 bytes, which is also the way from one pair of column tiles to the next (unless WIDE).
struct ValueOffsets {
    u32 own, last, across;

    VOLTA_DEVICE explicit ValueOffsets(const Lane& lane)
        : own(pin(value_offset(lane))),
          last(OUT_COLS % 2 ? pin(last_value_offset(lane)) : 0),
          across(pin(lane.side ? 0u - 8 * PITCH : 8 * PITCH)) {}

    VOLTA_DEVICE u32 pair(int crossed, int j) const {
        const int flips = WIDE ? crossed : crossed ^ (j & 1);
        return (own ^ static_cast<u32>(64 * flips)) + (crossed ? across : 0) + (WIDE ? 128 * j : j / 2 * 128);
    }
    VOLTA_DEVICE u32 single(int crossed) const { return crossed ? (last ^ 64) + across : last; }
};

// O += P V for 16 keys, whose probabilities this lane's quadpair and its neighbours hold.
VOLTA_DEVICE void multiply_values16(Output& out, const Operand8 (&own)[SCORE_ROWS], u32 tile, const ValueOffsets& at) {
#pragma unroll
    for (int crossed = 0; crossed < 2; ++crossed) {  // 8 keys that this side scored, then 8 of the other
        Operand8 a[2];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            a[m] = WIDE && m == 1 ? from_lane(own[0], 8 + 4 * crossed)
                   : crossed      ? from_lane(own[m % SCORE_ROWS], 4)
                                  : own[m % SCORE_ROWS];
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const u32 rows = tile + 4 * k * PITCH;
#pragma unroll
            for (int j = 0; j < OUT_COLS / 2; ++j) {
                const Word4 v = lds128(rows + at.pair(crossed, j));
#pragma unroll
                for (int m = 0; m < 2; ++m) mma_rr(out[m][2 * j], a[m].k[k], low_half_of(v));
#pragma unroll
                for (int m = 0; m < 2; ++m) mma_rr(out[m][2 * j + 1], a[m].k[k], high_half_of(v));
            }
            if (OUT_COLS % 2) {
                const Word2 v = lds64(rows + at.single(crossed));
#pragma unroll
                for (int m = 0; m < 2; ++m) mma_rr(out[m][OUT_COLS - 1], a[m].k[k], v);
            }
        }
    }
}

// ROLLED: half the code, for a few moves.
template <bool ROLLED>
VOLTA_DEVICE void multiply_values(Output& out, const Scores& p, u32 tile, ValueOffsets at, bool odd) {
    Operand8 own[SCORE_COLS][SCORE_ROWS];
#pragma unroll
    for (int t = 0; t < SCORE_COLS; ++t) {
#pragma unroll
        for (int m = 0; m < SCORE_ROWS; ++m) own[t][m] = to_operand(p[m][t], odd);
    }
#pragma unroll(ROLLED ? 1 : SCORE_COLS)
    for (int t = 0; t < SCORE_COLS; ++t) {
        multiply_values16(out, own[0], tile, at);
        at.own += 16 * PITCH;
        at.last += 16 * PITCH;
#pragma unroll
        for (int m = 0; m < SCORE_ROWS; ++m) own[0][m] = own[SCORE_COLS - 1][m];
    }
}

}  // namespace volta

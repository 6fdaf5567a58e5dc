// The two matrix products of a tile: S = Q K^T and O += P V.
#pragma once

#include "prefill_softmax.cuh"

namespace volta {

// Q of one warp: in registers where they allow it, else in shared memory.
struct Queries {
    u32 at;
    Word4 held[Q_IN_REGISTERS ? STEPS : 1][2];
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
    if (Q_IN_REGISTERS) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            multiply_step(sum, q.held[step][0], q.held[step][1], step_address(key_base, step));
        }
    } else {
        u32 at = q.at;
#pragma unroll 1
        for (int step = 0; step < STEPS / GROUP_STEPS * GROUP_STEPS; step += GROUP_STEPS) {
#pragma unroll
            for (int u = 0; u < GROUP_STEPS; ++u) {
                multiply_step(sum, lds128(at + 512 * u), lds128(at + 512 * u + 64), step_address(key_base, u));
            }
            at += 512 * GROUP_STEPS;
            key_base += 128;
        }
#pragma unroll
        for (int u = 0; u < STEPS % GROUP_STEPS; ++u) {
            multiply_step(sum, lds128(at + 512 * u), lds128(at + 512 * u + 64), step_address(key_base, u));
        }
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

// Where a lane reads V: [crossed][pair of column tiles], and the single last tile.
struct ValueAddresses {
    u32 pair[2][2];
    u32 last[2];

    VOLTA_DEVICE ValueAddresses(u32 tile, const Lane& lane) {
#pragma unroll
        for (int crossed = 0; crossed < 2; ++crossed) {
#pragma unroll
            for (int j = 0; j < 2; ++j) pair[crossed][j] = pin(tile + value_offset(lane, crossed, j));
            last[crossed] = pin(tile + last_value_offset(lane, crossed));
        }
    }
};

template <int TRIPS>
VOLTA_DEVICE void multiply_values(Output& out, const Scores& p, ValueAddresses at, bool odd) {
    Operand8 own[SCORE_COLS][SCORE_ROWS];
#pragma unroll
    for (int t = 0; t < SCORE_COLS; ++t) {
#pragma unroll
        for (int m = 0; m < SCORE_ROWS; ++m) own[t][m] = to_operand(p[m][t], odd);
    }
#pragma unroll(SCORE_COLS / TRIPS)
    for (int t = 0; t < SCORE_COLS; ++t) {  // 16 keys
#pragma unroll
        for (int crossed = 0; crossed < 2; ++crossed) {  // 8 that this side scored, then 8 of the other
            Operand8 a[2];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                a[m] = WIDE && m == 1 ? from_lane(own[0][0], 8 + 4 * crossed)
                       : crossed      ? from_lane(own[0][m % SCORE_ROWS], 4)
                                      : own[0][m % SCORE_ROWS];
            }
#pragma unroll
            for (int k = 0; k < 2; ++k) {
#pragma unroll
                for (int j = 0; j < OUT_COLS / 2; ++j) {
                    const u32 address = WIDE ? at.pair[crossed][0] + 128 * j : at.pair[crossed][j & 1] + 128 * (j >> 1);
                    const Word4 v = lds128(address + 4 * k * PITCH);
#pragma unroll
                    for (int m = 0; m < 2; ++m) mma_rr(out[m][2 * j], a[m].k[k], low_half_of(v));
#pragma unroll
                    for (int m = 0; m < 2; ++m) mma_rr(out[m][2 * j + 1], a[m].k[k], high_half_of(v));
                }
                if (OUT_COLS % 2) {
                    const Word2 v = lds64(at.last[crossed] + 4 * k * PITCH);
#pragma unroll
                    for (int m = 0; m < 2; ++m) mma_rr(out[m][OUT_COLS - 1], a[m].k[k], v);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < SCORE_ROWS; ++m) own[0][m] = own[SCORE_COLS - 1][m];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            at.pair[c][0] += 16 * PITCH;
            at.pair[c][1] += 16 * PITCH;
            at.last[c] += 16 * PITCH;
        }
    }
}

}  // namespace volta

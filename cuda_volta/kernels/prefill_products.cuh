// The two matrix products of a tile: S = Q K^T and O += P V.
#pragma once

#include "prefill_softmax.cuh"

namespace volta {

VOLTA_DEVICE Word2 low_k(const Word4& w) { return {w.x, w.y}; }
VOLTA_DEVICE Word2 high_k(const Word4& w) { return {w.z, w.w}; }

// Eight elements of the head dimension: two k4 steps of Q's two row tiles against SCORE_COLS key tiles.
VOLTA_DEVICE void multiply_step(float (&s)[2][SCORE_COLS][8], const Word4 (&q)[2], const Word4 (&k)[SCORE_COLS]) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < SCORE_COLS; ++n) mma_rc(s[m][n], low_k(q[m]), low_k(k[n]));
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < SCORE_COLS; ++n) mma_rc(s[m][n], high_k(q[m]), high_k(k[n]));
    }
}

VOLTA_DEVICE void load_key_step(Word4 (&k)[SCORE_COLS], u32 address) {
#pragma unroll
    for (int n = 0; n < SCORE_COLS; ++n) k[n] = lds128(address + static_cast<u32>(n * 16 * PITCH));
}

// Offset of step u from that of its 128-byte group: chunks of a group differ in bits that the swizzle flips.
VOLTA_DEVICE u32 key_step(u32 base, int step) {
    constexpr int PER_GROUP = WIDE ? 4 : 8;
    return (base ^ static_cast<u32>(step % PER_GROUP * (128 / PER_GROUP))) + step / PER_GROUP * 128;
}

}  // namespace volta

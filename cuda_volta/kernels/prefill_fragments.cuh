// Probabilities from accumulators to A operands, in registers.
#pragma once

#include "prefill_layout.cuh"

namespace volta {

// Accumulators hold P as floats scaled by 2^-112, so that the exponent's low five bits are already those of a
// half: eight times the bits, rounded, has the half in its upper 16 bits. This spares the conversion unit.
constexpr float HALF_EXPONENT_BIAS = 112.0f;
VOLTA_DEVICE u32 half_in_high_bits(float p) { return float_bits(p) * 8 + 0x8000; }
VOLTA_DEVICE u32 pack_biased(float low, float high) {
    return byte_permute(half_in_high_bits(low), half_in_high_bits(high), 0x7632);
}

// Rows r and r + 2 of lanes l and l ^ 2 hold columns {0, 1} and {2, 3}: one exchange gives each lane all four
// columns of the one row that it supplies to A.
VOLTA_DEVICE Word2 exchange_rows(u32 upper, u32 lower, bool odd) {
    u32 received = shuffle_xor(odd ? upper : lower, 2);
    return odd ? Word2{received, lower} : Word2{upper, received};
}

// The 8x8 accumulator tile d as the two A operands of its columns 0..3 and 4..7.
struct Operand8 {
    Word2 k[2];
};
VOLTA_DEVICE Operand8 to_operand(u32 r0c0, u32 r0c4, u32 r2c0, u32 r2c4, bool odd) {
    return {{exchange_rows(r0c0, r2c0, odd), exchange_rows(r0c4, r2c4, odd)}};
}
VOLTA_DEVICE Operand8 probabilities_to_operand(const float (&p)[8], bool odd) {
    return to_operand(pack_biased(p[0], p[1]), pack_biased(p[4], p[5]), pack_biased(p[2], p[3]),
                      pack_biased(p[6], p[7]), odd);
}
VOLTA_DEVICE Operand8 from_lane(const Operand8& a, u32 mask) {
    Operand8 r;
#pragma unroll
    for (int i = 0; i < 2; ++i) r.k[i] = {shuffle_xor(a.k[i].x, mask), shuffle_xor(a.k[i].y, mask)};
    return r;
}

}  // namespace volta

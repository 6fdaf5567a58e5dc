#include "tensor_core.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace volta::emulator {

namespace {

using Row = float __attribute__((vector_size(32)));
using RowBits = int __attribute__((vector_size(32)));

constexpr u32 LANES_OF_QUADPAIR = 8;

// Lanes 4q..4q+3 and 16+4q..19+4q.
u32 lane_of(u32 quadpair, u32 i) { return 4 * quadpair + i % 4 + 16 * (i / 4); }

float half(Word2 w, u32 i) {
    const u32 word = i < 2 ? w.x : w.y;
    const u16 bits = static_cast<u16>(i % 2 ? word >> 16 : word);
    Half h;
    std::memcpy(&h, &bits, 2);
    return static_cast<float>(h);
}

// d + sum of a[k] b[k] as Fasi et al., "Numerical behavior of NVIDIA tensor cores" (2021), section 3, found
// it on the V100: products are exact; the five summands are aligned to the largest exponent among them and
// truncated to 24 bits; their sum is rounded towards zero.
Row truncated_sum(Row d, const Row (&products)[4]) {
    const auto magnitude = [](Row x) { return (RowBits)x & 0x7fffffff; };
    const auto larger = [](RowBits a, RowBits b) {
        const RowBits greater = a > b;
        return (a & greater) | (b & ~greater);
    };
    RowBits most = magnitude(d);
    for (const Row& p : products) most = larger(most, magnitude(p));
    // Below 2^-90 the quantum stays what it is there, so that its inverse is finite.
    RowBits exponent = larger(most >> 23, RowBits{} + 37);
    const Row quantum = (Row)((exponent - 23) << 23), inverse = (Row)((254 + 23 - exponent) << 23);
    RowBits sum = __builtin_convertvector(d * inverse, RowBits);
    for (const Row& p : products) sum += __builtin_convertvector(p * inverse, RowBits);
    const RowBits negative = sum < 0;
    RowBits size = (sum ^ negative) - negative;
    // 24 significant bits remain of at most 27.
    const RowBits excess = -(size >= 1 << 24) - (size >= 1 << 25) - (size >= 1 << 26);
    size = (size >> excess) << excess;
    const Row value = __builtin_convertvector(size, Row) * quantum;
    return (Row)((RowBits)value | (negative & (int)0x80000000));
}

}  // namespace

void mma_m8n8k4(const MmaOperands& operands, bool b_is_row) {
    for (u32 q = 0; q < 4; q++) {
        float a[8][4], b[4][8], d[8][8];
        for (u32 i = 0; i < LANES_OF_QUADPAIR; i++) {
            const u32 lane = lane_of(q, i);
            for (u32 e = 0; e < 4; e++) {
                a[i][e] = half(operands.a[lane], e);
                if (b_is_row)
                    b[i % 4][e + 4 * (i / 4)] = half(operands.b[lane], e);
                else
                    b[e][i] = half(operands.b[lane], e);
            }
            for (u32 e = 0; e < 8; e++)
                d[(i & 1) + (e & 2) + 4 * (i / 4)][(e & 4) + (i & 2) + (e & 1)] = operands.d[lane][e];
        }
        Row columns[4];
        for (u32 k = 0; k < 4; k++) std::memcpy(&columns[k], b[k], sizeof(Row));
        for (u32 r = 0; r < 8; r++) {
            Row sum, products[4];
            std::memcpy(&sum, d[r], sizeof(Row));
            Row plain = sum;
            for (u32 k = 0; k < 4; k++) {
                products[k] = a[r][k] * columns[k];
                plain += products[k];
            }
            const RowBits special = ((RowBits)plain & 0x7f800000) == 0x7f800000;
            bool finite = true;
            for (u32 c = 0; c < 8; c++) finite &= !special[c];
            // Infinities and NaNs follow IEEE arithmetic in any order of summation.
            sum = finite ? truncated_sum(sum, products) : plain;
            std::memcpy(d[r], &sum, sizeof(Row));
        }
        for (u32 i = 0; i < LANES_OF_QUADPAIR; i++)
            for (u32 e = 0; e < 8; e++)
                operands.d[lane_of(q, i)][e] =
                    d[(i & 1) + (e & 2) + 4 * (i / 4)][(e & 4) + (i & 2) + (e & 1)];
    }
}

}  // namespace volta::emulator

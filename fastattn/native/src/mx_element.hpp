// Elements of quant/mx.py: W scaled floats to codes and back.
//
// Written in the compiler's vectors of W lanes, for integer arithmetic on the bits of floats. Where a product
// meets a sum, a bit operation lies between them: a compiler may otherwise fuse the two where the instruction
// set has fused multiply-add, and messages would depend on it.
#pragma once

#include "ops_table.hpp"
#include "simd_dot.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

typedef float lanes __attribute__((vector_size(4 * W)));
typedef int32_t ilanes __attribute__((vector_size(4 * W)));

constexpr int32_t INF_BITS = 0x7f800000, NAN_BITS = 0x7fc00000, ABS_BITS = 0x7fffffff;

FA_INLINE lanes load_lanes(const float* p) { return (lanes)load(p).v; }
FA_INLINE void store_lanes(float* p, lanes a) { memcpy(p, &a, sizeof a); }
FA_INLINE ilanes load_codes(const uint8_t* p) { return (ilanes)load_low_bytes(p).v; }
FA_INLINE void store_codes(uint8_t* p, ilanes a) {
    vi r;
    memcpy(&r.v, &a, sizeof a);
    store_low_bytes((int8_t*)p, r);
}

// 0, 1, 2, ...
FA_INLINE ilanes lane_numbers() {
    ilanes r;
    for (int i = 0; i < W; i++) r[i] = i;
    return r;
}
// Zero from lane n on.
FA_INLINE ilanes keep_first(ilanes a, int64_t n) {
    return n >= W ? a : (ilanes)(a & (lane_numbers() < int32_t(n)));
}
FA_INLINE ilanes at_least(ilanes a, int32_t least) { return a < least ? ilanes{} + least : a; }
FA_INLINE ilanes at_most(ilanes a, int32_t most) { return a > most ? ilanes{} + most : a; }

// 2^exponent for -126 <= exponent <= 127.
FA_INLINE float power_of_two(int exponent) { return bits_float(uint32_t(exponent + 127) << 23); }

FA_INLINE lanes power_of_two(ilanes exponent) { return (lanes)((exponent + 127) << 23); }

// Two factors that are applied one after the other, so that neither step leaves float32's range early.
struct Factor {
    float first, second;
};

struct Nearest {
    ilanes steps, exponent;  // |x| is about steps * 2^(exponent - 127 - mantissa_bits)
    lanes rounded;           // exactly that, and at most the largest value
};

FA_INLINE float largest_value(const MxFormat& f) {
    if (!f.exponent_bits) return float(f.max_code) * power_of_two(-f.mantissa_bits);
    const int fraction = f.max_code & ((1 << f.mantissa_bits) - 1);
    return float(fraction + (1 << f.mantissa_bits)) * power_of_two(f.emax - f.mantissa_bits);
}

// Adding a power of two whose last mantissa bit is worth one step of the element rounds to that step, ties
// to even, and leaves the number of steps in the low bits.
template <bool FLOAT>
FA_INLINE Nearest nearest(const MxFormat& f, ilanes magnitude) {
    ilanes exponent = ilanes{} + 127;
    if (FLOAT) exponent = at_least(magnitude >> 23, 128 - f.bias);
    const ilanes anchor = (exponent + (23 - f.mantissa_bits)) << 23;
    const lanes sum = (lanes)magnitude + (lanes)anchor, most = lanes{} + largest_value(f);
    const lanes rounded = sum - (lanes)anchor;
    return {(ilanes)sum - anchor, exponent, rounded > most ? most : rounded};
}

template <bool FLOAT>
FA_INLINE ilanes encode_lanes(const MxFormat& f, lanes x) {
    const ilanes u = (ilanes)x;
    const Nearest near = nearest<FLOAT>(f, u & ABS_BITS);
    const ilanes negative = u >> 31;
    if (!FLOAT)
        return ((at_most(near.steps, f.max_code) ^ negative) - negative) & ((1 << f.bits) - 1);
    const ilanes code = near.steps + ((near.exponent - (128 - f.bias)) << f.mantissa_bits);
    return at_most(code, f.max_code) | (negative & (1 << (f.bits - 1)));
}

// The value of each code times both factors, rounded once.
template <bool FLOAT>
FA_INLINE lanes decode_lanes(const MxFormat& f, ilanes code, Factor scale) {
    const ilanes wide = code << (32 - f.bits), sign = wide & INT32_MIN;
    lanes value;
    if (FLOAT) {
        // A significand below the smallest normal number is that number's exponent with a one too much.
        const ilanes magnitude = code & ((1 << (f.bits - 1)) - 1);
        const ilanes bits = (magnitude << (23 - f.mantissa_bits)) + ((127 - f.bias) << 23);
        const lanes subnormal = (lanes)(bits + (1 << 23)) - power_of_two(1 - f.bias);
        value = magnitude < (1 << f.mantissa_bits) ? subnormal : (lanes)bits;
        if (f.bits == 8) {  // E4M3 has a NaN above its largest number, E5M2 an infinity and NaNs
            const int32_t infinity = f.mantissa_bits == 2 ? f.max_code + 1 : -1;
            const ilanes beyond = magnitude == infinity ? ilanes{} + INF_BITS : ilanes{} + NAN_BITS;
            value = magnitude > f.max_code ? (lanes)beyond : value;
        }
    } else {
        const ilanes number = wide >> (32 - f.bits), negative = number >> 31;
        const ilanes magnitude = (number ^ negative) - negative;
        value = __builtin_convertvector(magnitude, lanes) * power_of_two(-f.mantissa_bits);
    }
    return (lanes)((ilanes)(value * scale.first * scale.second) ^ sign);
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

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

constexpr int32_t INF_BITS = 0x7f800000, ABS_BITS = 0x7fffffff;

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

// Two factors that are applied one after the other, so that neither step leaves float32's range early.
struct Factor {
    float first, second;
};
FA_INLINE Factor power_factor(int exponent) {
    const int half = exponent >> 1;
    return {power_of_two(half), power_of_two(exponent - half)};
}

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

// One value, of a float format.
FA_INLINE uint32_t encode_one(const MxFormat& f, float x) {
    return uint32_t(encode_lanes<true>(f, lanes{} + x)[0]);
}

// The value of each code times both factors, rounded once.
template <bool FLOAT>
FA_INLINE lanes decode_lanes(const MxFormat& f, ilanes code, Factor scale) {
    const int sign_bit = f.bits - 1;
    ilanes sign, significand, exponent = ilanes{} + (127 - f.mantissa_bits);
    if (FLOAT) {
        const ilanes magnitude = code & ((1 << sign_bit) - 1);
        const ilanes stored = magnitude >> f.mantissa_bits, fraction = magnitude & ((1 << f.mantissa_bits) - 1);
        sign = (code >> sign_bit) << 31;
        significand = fraction | ((stored > 0) & (1 << f.mantissa_bits));
        exponent = at_least(stored, 1) + (127 - f.bias - f.mantissa_bits);
    } else {
        const ilanes number = (code << (32 - f.bits)) >> (32 - f.bits), negative = number >> 31;
        sign = negative << 31;
        significand = (number ^ negative) - negative;
    }
    lanes value = __builtin_convertvector(significand, lanes) * (lanes)(exponent << 23);
    if (FLOAT && f.max_code < (1 << sign_bit) - 1) {
        // E4M3 has a NaN above its largest number, E5M2 an infinity and NaNs.
        const ilanes magnitude = code & ((1 << sign_bit) - 1);
        const int32_t infinity = f.bits == 8 && f.mantissa_bits == 2 ? f.max_code + 1 : -1;
        const ilanes beyond = magnitude == infinity ? ilanes{} + INF_BITS : ilanes{} + (INF_BITS | 0x400000);
        value = magnitude > f.max_code ? (lanes)beyond : value;
    }
    value = value * scale.first * scale.second;
    return (lanes)((ilanes)value ^ sign);
}

FA_INLINE float decode_one(const MxFormat& f, uint32_t code) {
    return decode_lanes<true>(f, ilanes{} + int32_t(code), {1.0f, 1.0f})[0];
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

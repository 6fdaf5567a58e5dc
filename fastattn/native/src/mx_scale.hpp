// Scales of blocks (quant/mx.py): chosen from the largest magnitude, written, read.
#pragma once

#include "mx_element.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr MxFormat E4M3 = {8, 4, 3, 7, 8, 0x7e, MxScale::e8m0, 0, 0, 0, 0, {}};

// A scale: what is stored, what values are multiplied by before they are rounded, and its size relative to
// others of the same block.
struct Scale {
    uint32_t code;
    Factor inverse;
    float size;
};

FA_INLINE int64_t scale_width(const MxFormat& f) { return f.scale == MxScale::fp16 ? 2 : 1; }
FA_INLINE int64_t scale_head(const MxFormat& f) { return f.scale == MxScale::e8m0 ? 0 : 1; }
FA_INLINE uint32_t nan_code(const MxFormat& f) {
    return f.scale == MxScale::e8m0 ? 255 : f.scale == MxScale::e4m3 ? 0x7f : 0x7e00;
}

// Bits of the largest magnitude; INF_BITS when there is a NaN or an infinity.
FA_INLINE uint32_t largest_bits(const float* x, int64_t n) {
    ilanes largest = {};
    for (int64_t i = 0; i < n; i += W) {
        const ilanes u = keep_first((ilanes)load_lanes(x + i) & ABS_BITS, n - i);
        largest = u > largest ? u : largest;
    }
    vf r;
    const ilanes capped = at_most(largest, INF_BITS);
    memcpy(&r.v, &capped, sizeof r.v);
    return float_bits(reduce_max(r));
}

// floor(log2) of a positive float given as bits; its 23 mantissa bits.
FA_INLINE int exponent_of(uint32_t bits, uint32_t* mantissa) {
    int shift = 0;
    while (!((bits << shift) & 0x7f800000u)) shift++;  // a subnormal, brought to the form of a normal number
    *mantissa = (bits << shift) & 0x7fffffu;
    return shift ? -126 - shift : int(bits >> 23) - 127;
}

FA_INLINE int clamp_exponent(int e) { return e < -127 ? -127 : e > 127 ? 127 : e; }

// The exponent that the rule gives a block; 0 <= amax < INF_BITS.
FA_INLINE int rule_exponent(const MxFormat& f, uint32_t amax) {
    if (amax == 0) return -127;
    uint32_t mantissa;
    const int exponent = exponent_of(amax, &mantissa) - f.emax;
    return clamp_exponent(exponent + (mantissa > uint32_t(f.carry_above)));
}

// k of a row whose largest magnitude is amax.
FA_INLINE int row_exponent(const MxFormat& f, uint32_t amax) {
    if (f.scale == MxScale::e8m0) return 0;
    if (amax == 0) return -127;
    uint32_t mantissa;
    return clamp_exponent(exponent_of(amax, &mantissa) - f.emax - f.top);
}

FA_INLINE float fine_value(const MxFormat& f, uint32_t code) {
    return f.scale == MxScale::e4m3 ? decode_one(E4M3, code) : to_float(f16{uint16_t(code)});
}

FA_INLINE Scale candidate_scale(const MxFormat& f, uint32_t amax, int k, int c) {
    if (f.scale == MxScale::e8m0) {
        const int rule = rule_exponent(f, amax), exponent = clamp_exponent(rule + int(f.candidate[c]));
        return {uint32_t(exponent + 127), power_factor(-exponent), power_of_two(exponent - rule)};
    }
    const Factor down = power_factor(-k);
    const float wanted = bits_float(amax) * down.first * down.second * f.candidate[c];
    const uint32_t code = f.scale == MxScale::e4m3 ? encode_one(E4M3, wanted) : from_float<f16>(wanted).bits;
    const float s = fine_value(f, code), inverse = s == 0.0f ? 0.0f : 1.0f / s;
    return {code, {down.first, down.second * inverse}, s};
}

FA_INLINE void write_scale(const MxFormat& f, uint8_t* scales, int64_t block, uint32_t code) {
    uint8_t* p = scales + scale_head(f) + block * scale_width(f);
    p[0] = uint8_t(code);
    if (f.scale == MxScale::fp16) p[1] = uint8_t(code >> 8);
}

// What elements of a block are multiplied by.
FA_INLINE Factor read_scale(const MxFormat& f, const uint8_t* scales, int64_t block) {
    const uint8_t* p = scales + scale_head(f) + block * scale_width(f);
    const int power = f.scale == MxScale::e8m0 ? *p : *scales;
    if (power == 255) return {__builtin_nanf(""), 1.0f};
    Factor r = power_factor(power - 127);
    if (f.scale != MxScale::e8m0)
        r.first *= fine_value(f, f.scale == MxScale::fp16 ? uint32_t(p[0] | p[1] << 8) : p[0]);
    return r;
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

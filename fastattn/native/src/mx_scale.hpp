// Scales of blocks (quant/mx.py): chosen from the largest magnitudes, written, read; W blocks at a time.
#pragma once

#include "mx_element.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr MxFormat E4M3 = {8, 4, 3, 7, 8, 0x7e, MxScale::e8m0, 0, 0, 0, 0, {}};

FA_INLINE int64_t scale_width(const MxFormat& f) { return f.scale == MxScale::fp16 ? 2 : 1; }
FA_INLINE int64_t scale_head(const MxFormat& f) { return f.scale == MxScale::e8m0 ? 0 : 1; }
FA_INLINE int32_t nan_code(const MxFormat& f) {
    return f.scale == MxScale::e8m0 ? 255 : f.scale == MxScale::e4m3 ? 0x7f : 0x7e00;
}

// Bits of the largest magnitude; INF_BITS when there is a NaN or an infinity.
FA_INLINE int32_t largest_bits(const float* x, int64_t n) {
    ilanes largest = {};
    for (int64_t i = 0; i < n; i += W) {
        const ilanes u = keep_first((ilanes)load_lanes(x + i) & ABS_BITS, n - i);
        largest = u > largest ? u : largest;
    }
    vf r;
    const ilanes capped = at_most(largest, INF_BITS);
    memcpy(&r.v, &capped, sizeof r.v);
    return int32_t(float_bits(reduce_max(r)));
}

// Positive floats as bits, subnormal ones m * 2^-149 brought to the form of normal numbers.
FA_INLINE ilanes normalised(ilanes bits) {
    const ilanes subnormal = (ilanes)__builtin_convertvector(bits, lanes) - (149 << 23);
    return bits < (1 << 23) ? subnormal : bits;
}
FA_INLINE ilanes clamp_exponent(ilanes e) { return at_most(at_least(e, -127), 127); }

// k of a row whose largest magnitude is amax; E8M0 scales have none.
FA_INLINE int row_exponent(const MxFormat& f, int32_t amax) {
    if (amax == 0) return -127;
    const ilanes exponent = (normalised(ilanes{} + amax) >> 23) - (127 + f.emax + f.top);
    return clamp_exponent(exponent)[0];
}

// Scales of W blocks: what is stored, what values are multiplied by before they are rounded, and a size to
// compare the scales of one block by.
struct Scales {
    ilanes code;
    lanes first, second;
    lanes size;
};

FA_INLINE Scales power_scales(const MxFormat& f, ilanes amax, float offset) {
    const ilanes bits = normalised(amax);
    ilanes rule = (bits >> 23) - (127 + f.emax) - ((bits & 0x7fffff) > f.carry_above);
    rule = amax == 0 ? ilanes{} - 127 : clamp_exponent(rule);
    const ilanes exponent = clamp_exponent(rule + int32_t(offset)), half = -exponent >> 1;
    return {exponent + 127, power_of_two(half), power_of_two(-exponent - half),
            power_of_two(exponent - rule)};
}

FA_INLINE lanes fine_values(const MxFormat& f, ilanes code) {
    if (f.scale == MxScale::e4m3) return decode_lanes<true>(E4M3, code, {1.0f, 1.0f});
    f16 narrow[W];
    for (int i = 0; i < W; i++) narrow[i].bits = uint16_t(code[i]);
    return (lanes)load(narrow).v;
}

FA_INLINE ilanes round_scales(const MxFormat& f, lanes s) {
    if (f.scale == MxScale::e4m3) return encode_lanes<true>(E4M3, s);
    f16 narrow[W];
    vf wide;
    memcpy(&wide.v, &s, sizeof s);
    store(narrow, wide);
    ilanes code;
    for (int i = 0; i < W; i++) code[i] = narrow[i].bits;
    return code;
}

FA_INLINE Scales fine_scales(const MxFormat& f, ilanes amax, int k, float candidate) {
    const int half = -k >> 1;
    const float first = power_of_two(half), second = power_of_two(-k - half);
    const ilanes code = round_scales(f, (lanes)amax * first * second * candidate);
    const lanes s = fine_values(f, code), inverse = s == 0.0f ? lanes{} : 1.0f / s;
    return {code, lanes{} + first, inverse * second, s};
}

FA_INLINE void write_scale(const MxFormat& f, uint8_t* scales, int64_t block, int32_t code) {
    uint8_t* p = scales + scale_head(f) + block * scale_width(f);
    p[0] = uint8_t(code);
    if (f.scale == MxScale::fp16) p[1] = uint8_t(code >> 8);
}

// What elements of each block are multiplied by. Both arrays are written up to a multiple of W.
static void read_scales(const MxFormat& f, const uint8_t* scales, int64_t blocks, float* first,
                        float* second) {
    const bool powers = f.scale == MxScale::e8m0;
    const uint8_t* p = scales + scale_head(f);
    for (int64_t b = 0; b < blocks; b += W) {
        ilanes code = {};
        for (int64_t i = 0; i < W && b + i < blocks; i++)
            code[i] = f.scale == MxScale::fp16 ? p[2 * (b + i)] | p[2 * (b + i) + 1] << 8 : p[b + i];
        const ilanes power = powers ? code : ilanes{} + *scales, exponent = power - 127, half = exponent >> 1;
        const lanes small = power == 255 ? (lanes)(ilanes{} + NAN_BITS) : power_of_two(half);
        store_lanes(first + b, powers ? small : small * fine_values(f, code));
        store_lanes(second + b, power_of_two(power == 255 ? ilanes{} : exponent - half));
    }
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

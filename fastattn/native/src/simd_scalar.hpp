// Scalar conversions, exact for subnormals, infinities and NaN, independent of the FPU's flush modes.
#pragma once

namespace fastattn {
namespace FASTATTN_ISA {

FA_INLINE uint32_t float_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
FA_INLINE float bits_float(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

FA_INLINE float to_float(float x) { return x; }
FA_INLINE float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }
FA_INLINE float to_float(f16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, body = uint32_t(x.bits & 0x7fffu) << 13;
    uint32_t u = body + (112u << 23);
    if (body >= (31u << 23)) {
        u += 112u << 23;  // infinity and NaN
    } else if (body < (1u << 23)) {
        u = float_bits(bits_float(u + (1u << 23)) - bits_float(113u << 23));  // zero and subnormals
    }
    return bits_float(u | sign);
}

template <class T>
FA_INLINE T from_float(float x);
template <>
inline __attribute__((always_inline)) float from_float<float>(float x) {
    return x;
}
template <>
inline __attribute__((always_inline)) bf16 from_float<bf16>(float x) {
    const uint32_t u = float_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((u >> 16) | 0x40u)};
    return bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
inline __attribute__((always_inline)) f16 from_float<f16>(float x) {
    uint32_t u = float_bits(x);
    const uint32_t sign = (u & 0x80000000u) >> 16;
    u &= 0x7fffffffu;
    uint32_t h;
    if (u >= (143u << 23)) {
        h = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (u < (113u << 23)) {
        h = float_bits(bits_float(u) + 0.5f) -
            float_bits(0.5f);  // the addition rounds to a multiple of 2^-24
    } else {
        h = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
    }
    return f16{uint16_t(h | sign)};
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn

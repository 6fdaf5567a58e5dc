// Portable SIMD: 16-byte vectors of the compiler (SSE2, NEON or scalar code), no instruction set assumed.
#pragma once

#include "simd_scalar.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int W = 4;
constexpr int REGISTERS = 16;

typedef float nf __attribute__((vector_size(16)));
typedef int32_t ni __attribute__((vector_size(16)));

struct vf {
    nf v;
};
struct vm {
    ni v;
};

FA_INLINE vf set1(float x) { return {nf{x, x, x, x}}; }
FA_INLINE vf zero() { return set1(0.0f); }
FA_INLINE vf load(const float* p) {
    vf r;
    memcpy(&r.v, p, 16);
    return r;
}
FA_INLINE void store(float* p, vf a) { memcpy(p, &a.v, 16); }
FA_INLINE vf load(const bf16* p) {
    return {nf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
FA_INLINE vf load(const f16* p) {
    const ni h = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
    const ni sign = (h & 0x8000) << 16, body = (h & 0x7fff) << 13;
    const ni big = body >= (31 << 23), tiny = body < (1 << 23);
    ni u = body + (112 << 23);
    u += big & (112 << 23);
    const nf sub = (nf)(u + (1 << 23)) - (nf)(ni{113 << 23, 113 << 23, 113 << 23, 113 << 23});
    u = (tiny & (ni)sub) | (~tiny & u);
    return {(nf)(u | sign)};
}
template <class T>
FA_INLINE void store(T* p, vf a) {
    for (int i = 0; i < 4; i++) p[i] = from_float<T>(a.v[i]);
}
FA_INLINE vf load_i8(const int8_t* p) { return {nf{float(p[0]), float(p[1]), float(p[2]), float(p[3])}}; }
FA_INLINE void load_nibbles(const uint8_t* p, vf& lo, vf& hi) {
    const ni b = {p[0], p[1], p[2], p[3]};
    lo.v = __builtin_convertvector(b & 15, nf);
    hi.v = __builtin_convertvector(b >> 4, nf);
}

FA_INLINE vf operator+(vf a, vf b) { return {a.v + b.v}; }
FA_INLINE vf operator-(vf a, vf b) { return {a.v - b.v}; }
FA_INLINE vf operator*(vf a, vf b) { return {a.v * b.v}; }
FA_INLINE vf operator/(vf a, vf b) { return {a.v / b.v}; }
FA_INLINE vf fma(vf a, vf b, vf c) { return {a.v * b.v + c.v}; }
FA_INLINE vf fnma(vf a, vf b, vf c) { return {c.v - a.v * b.v}; }
FA_INLINE vm lt(vf a, vf b) { return {(ni)(a.v < b.v)}; }
FA_INLINE vf select(vm m, vf a, vf b) { return {(nf)((m.v & (ni)a.v) | (~m.v & (ni)b.v))}; }
FA_INLINE vf min(vf a, vf b) { return select(lt(a, b), a, b); }  // b if either is NaN
FA_INLINE vf max(vf a, vf b) { return select(lt(b, a), a, b); }  // b if either is NaN
FA_INLINE vf abs(vf a) { return {(nf)((ni)a.v & 0x7fffffff)}; }
FA_INLINE vf copysign(vf magnitude, vf sign) {
    return {(nf)(((ni)magnitude.v & 0x7fffffff) | ((ni)sign.v & (int32_t)0x80000000))};
}
// Nearest integer for |a| < 2^22.
FA_INLINE vf round(vf a) {
    const nf magic = {12582912.0f, 12582912.0f, 12582912.0f, 12582912.0f};
    return {(a.v + magic) - magic};
}
// a * 2^n for integral n in [-252, 254], in two steps so that neither factor leaves the normal range.
FA_INLINE vf ldexp(vf a, vf n) {
    const ni k = __builtin_convertvector(n.v, ni), k1 = k >> 1, k2 = k - k1;
    return {a.v * (nf)((k1 + 127) << 23) * (nf)((k2 + 127) << 23)};
}
FA_INLINE float reduce_add(vf a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
FA_INLINE float reduce_max(vf a) {
    const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
    return x > y ? x : y;
}
FA_INLINE vf transpose_sum(const vf* a) {
    return {nf{reduce_add(a[0]), reduce_add(a[1]), reduce_add(a[2]), reduce_add(a[3])}};
}
// In place: lane j of a[i] becomes lane i of a[j].
FA_INLINE void transpose(vf* a) {
    for (int i = 0; i < W; i++)
        for (int j = 0; j < i; j++) {
            const float t = a[i].v[j];
            a[i].v[j] = a[j].v[i];
            a[j].v[i] = t;
        }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn

#include "simd_tail.hpp"

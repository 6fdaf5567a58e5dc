// NEON of aarch64.
#pragma once

#include <arm_neon.h>

#include "simd_scalar.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int W = 4;
constexpr int REGISTERS = 32;

struct vf {
    float32x4_t v;
};
struct vm {
    uint32x4_t v;
};

FA_INLINE vf set1(float x) { return {vdupq_n_f32(x)}; }
FA_INLINE vf zero() { return set1(0.0f); }
FA_INLINE vf load(const float* p) { return {vld1q_f32(p)}; }
FA_INLINE void store(float* p, vf a) { vst1q_f32(p, a.v); }
FA_INLINE vf load(const f16* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)))}; }
FA_INLINE void store(f16* p, vf a) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(a.v))); }
FA_INLINE vf load(const bf16* p) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16))}; }
FA_INLINE void store(bf16* p, vf a) {
    const uint32x4_t u = vreinterpretq_u32_f32(a.v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t r = vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
    vst1_u16(&p->bits, vshrn_n_u32(vbslq_u32(vceqq_f32(a.v, a.v), r, quiet), 16));
}
FA_INLINE uint32x4_t widen_u8(const uint8_t* p) {
    uint32_t four;
    memcpy(&four, p, 4);
    return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
}
FA_INLINE vf load_i8(const int8_t* p) {
    uint32_t four;
    memcpy(&four, p, 4);
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))))};
}
FA_INLINE void load_nibbles(const uint8_t* p, vf& lo, vf& hi) {
    const uint32x4_t b = widen_u8(p);
    lo.v = vcvtq_f32_u32(vandq_u32(b, vdupq_n_u32(15)));
    hi.v = vcvtq_f32_u32(vshrq_n_u32(b, 4));
}

FA_INLINE vf operator+(vf a, vf b) { return {vaddq_f32(a.v, b.v)}; }
FA_INLINE vf operator-(vf a, vf b) { return {vsubq_f32(a.v, b.v)}; }
FA_INLINE vf operator*(vf a, vf b) { return {vmulq_f32(a.v, b.v)}; }
FA_INLINE vf operator/(vf a, vf b) { return {vdivq_f32(a.v, b.v)}; }
FA_INLINE vf fma(vf a, vf b, vf c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
FA_INLINE vf fnma(vf a, vf b, vf c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
FA_INLINE vm lt(vf a, vf b) { return {vcltq_f32(a.v, b.v)}; }
FA_INLINE vf select(vm m, vf a, vf b) { return {vbslq_f32(m.v, a.v, b.v)}; }
FA_INLINE vf min(vf a, vf b) { return select(lt(a, b), a, b); }  // b if either is NaN
FA_INLINE vf max(vf a, vf b) { return select(lt(b, a), a, b); }  // b if either is NaN
FA_INLINE vf abs(vf a) { return {vabsq_f32(a.v)}; }
FA_INLINE vf copysign(vf magnitude, vf sign) {
    return {vbslq_f32(vdupq_n_u32(0x80000000u), sign.v, magnitude.v)};
}
FA_INLINE vf round(vf a) { return {vrndnq_f32(a.v)}; }
// a * 2^n for integral n in [-252, 254], in two steps so that neither factor leaves the normal range.
FA_INLINE vf ldexp(vf a, vf n) {
    const int32x4_t k = vcvtq_s32_f32(n.v), k1 = vshrq_n_s32(k, 1), k2 = vsubq_s32(k, k1);
    const int32x4_t bias = vdupq_n_s32(127);
    const float32x4_t f1 = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(k1, bias), 23));
    const float32x4_t f2 = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(k2, bias), 23));
    return {vmulq_f32(vmulq_f32(a.v, f1), f2)};
}
FA_INLINE float reduce_add(vf a) { return vaddvq_f32(a.v); }
FA_INLINE float reduce_max(vf a) { return vmaxvq_f32(a.v); }
FA_INLINE vf transpose_sum(const vf* a) {
    return {vpaddq_f32(vpaddq_f32(a[0].v, a[1].v), vpaddq_f32(a[2].v, a[3].v))};
}
// In place: lane j of a[i] becomes lane i of a[j].
FA_INLINE void transpose(vf* a) {
    const float64x2_t x0 = vreinterpretq_f64_f32(vtrn1q_f32(a[0].v, a[1].v));
    const float64x2_t x1 = vreinterpretq_f64_f32(vtrn2q_f32(a[0].v, a[1].v));
    const float64x2_t y0 = vreinterpretq_f64_f32(vtrn1q_f32(a[2].v, a[3].v));
    const float64x2_t y1 = vreinterpretq_f64_f32(vtrn2q_f32(a[2].v, a[3].v));
    a[0].v = vreinterpretq_f32_f64(vtrn1q_f64(x0, y0));
    a[1].v = vreinterpretq_f32_f64(vtrn1q_f64(x1, y1));
    a[2].v = vreinterpretq_f32_f64(vtrn2q_f64(x0, y0));
    a[3].v = vreinterpretq_f32_f64(vtrn2q_f64(x1, y1));
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn

#include "simd_tail.hpp"

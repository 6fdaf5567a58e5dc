// Bytes and integers of NEON. Base aarch64 has no dot product: products are widened and added in pairs.
#pragma once

namespace fastattn {
namespace FASTATTN_ISA {

struct vb {
    int8x16_t v;
};
struct vi {
    int32x4_t v;
};

FA_INLINE vb load_bytes(const void* p) { return {vld1q_s8(static_cast<const int8_t*>(p))}; }
FA_INLINE vb set1_byte(int x) { return {vdupq_n_s8(int8_t(x))}; }
FA_INLINE void nibbles(vb a, vb& lo, vb& hi) {
    lo.v = vandq_s8(a.v, vdupq_n_s8(15));
    hi.v = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(a.v), 4));
}

FA_INLINE vi load_ints(const int32_t* p) { return {vld1q_s32(p)}; }
FA_INLINE void store_ints(int32_t* p, vi a) { vst1q_s32(p, a.v); }
FA_INLINE vi set1_int(int32_t x) { return {vdupq_n_s32(x)}; }
FA_INLINE vi operator+(vi a, vi b) { return {vaddq_s32(a.v, b.v)}; }
FA_INLINE vi operator-(vi a, vi b) { return {vsubq_s32(a.v, b.v)}; }
FA_INLINE vi operator^(vi a, vi b) { return {veorq_s32(a.v, b.v)}; }
template <int N>
FA_INLINE vi shift_left(vi a) {
    return {vshlq_n_s32(a.v, N)};
}
template <int N>
FA_INLINE vi shift_right(vi a) {
    return {vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v), N))};
}
FA_INLINE vf as_float(vi a) { return {vreinterpretq_f32_s32(a.v)}; }
FA_INLINE vi as_int(vf a) { return {vreinterpretq_s32_f32(a.v)}; }
FA_INLINE vi to_int(vf a) { return {vcvtnq_s32_f32(a.v)}; }
FA_INLINE vi load_low_bytes(const uint8_t* p) { return {vreinterpretq_s32_u32(widen_u8(p))}; }
FA_INLINE void store_low_bytes(int8_t* p, vi a) {
    const int16x4_t half = vmovn_s32(a.v);
    const int8x8_t low = vmovn_s16(vcombine_s16(half, half));
    memcpy(p, &low, 4);
}
FA_INLINE vf max_of_fours(vf a) { return set1(reduce_max(a)); }
FA_INLINE void store_fours(float* p, vf a) { *p = vgetq_lane_f32(a.v, 0); }
constexpr int SPREAD = 1;
FA_INLINE vf spread(const float* p, vi) { return {vld1q_dup_f32(p)}; }
FA_INLINE vf spread(const f16* p, vi) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_dup_u16(&p->bits)))}; }

constexpr int BYTE_BIAS = 0;
FA_INLINE vb biased(vb a) { return a; }
FA_INLINE vi dot_bytes(vi acc, vb q, vb s) {
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(q.v), vget_low_s8(s.v)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(q.v, s.v));
    return {vaddq_s32(acc.v, vpaddq_s32(low, high))};
}
FA_INLINE vi dot_nibbles(vi acc, vb lo, vb s_lo, vb hi, vb s_hi) {
    const int16x8_t low =
        vmlal_s8(vmull_s8(vget_low_s8(lo.v), vget_low_s8(s_lo.v)), vget_low_s8(hi.v), vget_low_s8(s_hi.v));
    const int16x8_t high = vmlal_high_s8(vmull_high_s8(lo.v, s_lo.v), hi.v, s_hi.v);
    return {vpadalq_s16(acc.v, vpaddq_s16(low, high))};
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn

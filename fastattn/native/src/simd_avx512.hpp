// AVX-512 F, BW, VL, DQ; with BF16 dot products where the translation unit enables them.
#pragma once

#include <immintrin.h>

#include "simd_scalar.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int W = 16;
constexpr int REGISTERS = 32;

struct vf {
    __m512 v;
};
struct vm {
    __mmask16 v;
};

FA_INLINE __mmask16 first(int n) { return (__mmask16)((1u << n) - 1u); }

FA_INLINE vf set1(float x) { return {_mm512_set1_ps(x)}; }
FA_INLINE vf zero() { return {_mm512_setzero_ps()}; }
FA_INLINE vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
FA_INLINE vf load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
FA_INLINE void store(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
FA_INLINE void store_n(float* p, vf a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }

FA_INLINE vf load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
FA_INLINE vf load_n(const f16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }
FA_INLINE __m256i narrow_f16(vf a) {
    return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FA_INLINE void store(f16* p, vf a) { _mm256_storeu_si256((__m256i*)p, narrow_f16(a)); }
FA_INLINE void store_n(f16* p, vf a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_f16(a)); }

FA_INLINE vf widen_bf16(__m256i h) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
FA_INLINE vf load(const bf16* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
FA_INLINE vf load_n(const bf16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
FA_INLINE __m256i narrow_bf16(vf a) {
    const __m512i u = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16));
}
FA_INLINE void store(bf16* p, vf a) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(a)); }
FA_INLINE void store_n(bf16* p, vf a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(a)); }

FA_INLINE vf load_i8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
FA_INLINE void load_nibbles(const uint8_t* p, vf& lo, vf& hi) {
    const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    lo.v = _mm512_cvtepi32_ps(_mm512_and_si512(b, _mm512_set1_epi32(15)));
    hi.v = _mm512_cvtepi32_ps(_mm512_srli_epi32(b, 4));
}

FA_INLINE vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
FA_INLINE vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
FA_INLINE vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
FA_INLINE vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
FA_INLINE vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FA_INLINE vf fnma(vf a, vf b, vf c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
FA_INLINE vm lt(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
FA_INLINE vf select(vm m, vf a, vf b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
FA_INLINE vf min(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }  // b if either is NaN
FA_INLINE vf max(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }  // b if either is NaN
FA_INLINE vf abs(vf a) { return {_mm512_abs_ps(a.v)}; }
FA_INLINE vf copysign(vf magnitude, vf sign) {
    const __m512 s = _mm512_set1_ps(-0.0f);
    return {_mm512_or_ps(_mm512_andnot_ps(s, magnitude.v), _mm512_and_ps(s, sign.v))};
}
FA_INLINE vf round(vf a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FA_INLINE vf ldexp(vf a, vf n) { return {_mm512_scalef_ps(a.v, n.v)}; }
FA_INLINE float reduce_add(vf a) { return _mm512_reduce_add_ps(a.v); }
FA_INLINE float reduce_max(vf a) { return _mm512_reduce_max_ps(a.v); }
FA_INLINE __m512 sum_four(const vf* a) {  // each 128-bit quarter: partial sums of a[0..3]
    const __m512 x = _mm512_add_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
    const __m512 y = _mm512_add_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
    return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
}
FA_INLINE __m512 sum_halves(__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
}
FA_INLINE vf transpose_sum(const vf* a) {
    const __m512 x = sum_halves(sum_four(a), sum_four(a + 4));
    const __m512 y = sum_halves(sum_four(a + 8), sum_four(a + 12));
    return {sum_halves(x, y)};
}
// In place: lane j of a[i] becomes lane i of a[j].
FA_INLINE void transpose(vf* a) {
    __m512 t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {  // 4 x 4 within each 128-bit quarter
        const __m512 x0 = _mm512_unpacklo_ps(a[i].v, a[i + 1].v), x1 = _mm512_unpackhi_ps(a[i].v, a[i + 1].v);
        const __m512 y0 = _mm512_unpacklo_ps(a[i + 2].v, a[i + 3].v),
                     y1 = _mm512_unpackhi_ps(a[i + 2].v, a[i + 3].v);
        t[i] = _mm512_shuffle_ps(x0, y0, 0x44);
        t[i + 1] = _mm512_shuffle_ps(x0, y0, 0xee);
        t[i + 2] = _mm512_shuffle_ps(x1, y1, 0x44);
        t[i + 3] = _mm512_shuffle_ps(x1, y1, 0xee);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {  // 4 x 4 of quarters
        const __m512 x0 = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x44),
                     x1 = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xee);
        const __m512 y0 = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x44);
        const __m512 y1 = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xee);
        a[i].v = _mm512_shuffle_f32x4(x0, y0, 0x88);
        a[i + 4].v = _mm512_shuffle_f32x4(x0, y0, 0xdd);
        a[i + 8].v = _mm512_shuffle_f32x4(x1, y1, 0x88);
        a[i + 12].v = _mm512_shuffle_f32x4(x1, y1, 0xdd);
    }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn

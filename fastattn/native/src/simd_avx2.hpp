// AVX2 + FMA + F16C.
#pragma once

#include <immintrin.h>

#include "simd_scalar.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int W = 8;
constexpr int REGISTERS = 16;

struct vf {
    __m256 v;
};
struct vm {
    __m256 v;
};

FA_INLINE vf set1(float x) { return {_mm256_set1_ps(x)}; }
FA_INLINE vf zero() { return {_mm256_setzero_ps()}; }
FA_INLINE vf load(const float* p) { return {_mm256_loadu_ps(p)}; }
FA_INLINE void store(float* p, vf a) { _mm256_storeu_ps(p, a.v); }
FA_INLINE vf load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
FA_INLINE void store(f16* p, vf a) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FA_INLINE vf load(const bf16* p) {
    const __m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(u, 16))};
}
FA_INLINE void store(bf16* p, vf a) {
    const __m256i u = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    r = _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, _mm256_castps_si256(nan)), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
FA_INLINE vf load_i8(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
}
FA_INLINE void load_nibbles(const uint8_t* p, vf& lo, vf& hi) {
    const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
    lo.v = _mm256_cvtepi32_ps(_mm256_and_si256(b, _mm256_set1_epi32(15)));
    hi.v = _mm256_cvtepi32_ps(_mm256_srli_epi32(b, 4));
}

FA_INLINE vf operator+(vf a, vf b) { return {_mm256_add_ps(a.v, b.v)}; }
FA_INLINE vf operator-(vf a, vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
FA_INLINE vf operator*(vf a, vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
FA_INLINE vf operator/(vf a, vf b) { return {_mm256_div_ps(a.v, b.v)}; }
FA_INLINE vf fma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FA_INLINE vf fnma(vf a, vf b, vf c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
FA_INLINE vm lt(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
FA_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FA_INLINE vf select(vm m, vf a, vf b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
FA_INLINE vf min(vf a, vf b) { return {_mm256_min_ps(a.v, b.v)}; }  // b if either is NaN
FA_INLINE vf max(vf a, vf b) { return {_mm256_max_ps(a.v, b.v)}; }  // b if either is NaN
FA_INLINE vf abs(vf a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
FA_INLINE vf copysign(vf magnitude, vf sign) {
    return {_mm256_or_ps(abs(magnitude).v, _mm256_and_ps(_mm256_set1_ps(-0.0f), sign.v))};
}
FA_INLINE vf round(vf a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for integral n in [-252, 254], in two steps so that neither factor leaves the normal range.
FA_INLINE vf ldexp(vf a, vf n) {
    const __m256i k = _mm256_cvtps_epi32(n.v), k1 = _mm256_srai_epi32(k, 1), k2 = _mm256_sub_epi32(k, k1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256 f1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k1, bias), 23));
    const __m256 f2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k2, bias), 23));
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, f1), f2)};
}
FA_INLINE float reduce_add(vf a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
FA_INLINE float reduce_max(vf a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
FA_INLINE __m256 sum_four(const vf* a) {  // each 128-bit half: partial sums of a[0..3]
    const __m256 x = _mm256_add_ps(_mm256_unpacklo_ps(a[0].v, a[1].v), _mm256_unpackhi_ps(a[0].v, a[1].v));
    const __m256 y = _mm256_add_ps(_mm256_unpacklo_ps(a[2].v, a[3].v), _mm256_unpackhi_ps(a[2].v, a[3].v));
    return _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
}
FA_INLINE vf transpose_sum(const vf* a) {
    const __m256 x = sum_four(a), y = sum_four(a + 4);
    return {_mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31))};
}
// In place: lane j of a[i] becomes lane i of a[j].
FA_INLINE void transpose(vf* a) {
    __m256 t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {  // 4 x 4 within each 128-bit half
        const __m256 x0 = _mm256_unpacklo_ps(a[i].v, a[i + 1].v), x1 = _mm256_unpackhi_ps(a[i].v, a[i + 1].v);
        const __m256 y0 = _mm256_unpacklo_ps(a[i + 2].v, a[i + 3].v),
                     y1 = _mm256_unpackhi_ps(a[i + 2].v, a[i + 3].v);
        t[i] = _mm256_shuffle_ps(x0, y0, 0x44);
        t[i + 1] = _mm256_shuffle_ps(x0, y0, 0xee);
        t[i + 2] = _mm256_shuffle_ps(x1, y1, 0x44);
        t[i + 3] = _mm256_shuffle_ps(x1, y1, 0xee);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        a[i].v = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
        a[i + 4].v = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
}

FA_INLINE vf load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
FA_INLINE void store_n(float* p, vf a, int n) { _mm256_maskstore_ps(p, first(n), a.v); }

}  // namespace FASTATTN_ISA
}  // namespace fastattn

#include "simd_tail.hpp"

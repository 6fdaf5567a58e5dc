// Bytes and integers of AVX2.
#pragma once

namespace fastattn {
namespace FASTATTN_ISA {

struct vb {
    __m256i v;
};
struct vi {
    __m256i v;
};

FA_INLINE vb load_bytes(const void* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
FA_INLINE vb set1_byte(int x) { return {_mm256_set1_epi8(char(x))}; }
FA_INLINE void nibbles(vb a, vb& lo, vb& hi) {
    const __m256i mask = _mm256_set1_epi8(15);
    lo.v = _mm256_and_si256(a.v, mask);
    hi.v = _mm256_and_si256(_mm256_srli_epi16(a.v, 4), mask);
}

FA_INLINE vi load_ints(const int32_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
FA_INLINE void store_ints(int32_t* p, vi a) { _mm256_storeu_si256((__m256i*)p, a.v); }
FA_INLINE vi set1_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
FA_INLINE vi operator+(vi a, vi b) { return {_mm256_add_epi32(a.v, b.v)}; }
FA_INLINE vi operator-(vi a, vi b) { return {_mm256_sub_epi32(a.v, b.v)}; }
FA_INLINE vi operator^(vi a, vi b) { return {_mm256_xor_si256(a.v, b.v)}; }
template <int N>
FA_INLINE vi shift_left(vi a) {
    return {_mm256_slli_epi32(a.v, N)};
}
template <int N>
FA_INLINE vi shift_right(vi a) {
    return {_mm256_srli_epi32(a.v, N)};
}
FA_INLINE vf as_float(vi a) { return {_mm256_castsi256_ps(a.v)}; }
FA_INLINE vi as_int(vf a) { return {_mm256_castps_si256(a.v)}; }
FA_INLINE vi to_int(vf a) { return {_mm256_cvtps_epi32(a.v)}; }
FA_INLINE vi load_low_bytes(const uint8_t* p) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))}; }
FA_INLINE void store_low_bytes(int8_t* p, vi a) {
    const __m256i low = _mm256_shuffle_epi8(a.v, _mm256_set1_epi32(0x0c080400));
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64((__m128i*)p, both);
}
FA_INLINE vf max_of_fours(vf a) {
    a = max(a, {_mm256_permute_ps(a.v, 0xb1)});
    return max(a, {_mm256_permute_ps(a.v, 0x4e)});
}
FA_INLINE void store_fours(float* p, vf a) {
    _mm_storel_pi((__m64*)p, _mm_unpacklo_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1)));
}
constexpr int SPREAD = 8;
template <class T>
FA_INLINE vf spread(const T* p, vi index) {
    return {_mm256_permutevar8x32_ps(load(p).v, index.v)};
}

constexpr int BYTE_BIAS = 0;
FA_INLINE vb biased(vb a) { return a; }
FA_INLINE __m256i even_bytes(vb a) { return _mm256_srai_epi16(_mm256_slli_epi16(a.v, 8), 8); }
FA_INLINE __m256i odd_bytes(vb a) { return _mm256_srai_epi16(a.v, 8); }
FA_INLINE vi dot_bytes(vi acc, vb q, vb s) {
    const __m256i even = _mm256_madd_epi16(even_bytes(q), even_bytes(s));
    const __m256i odd = _mm256_madd_epi16(odd_bytes(q), odd_bytes(s));
    return {_mm256_add_epi32(acc.v, _mm256_add_epi32(even, odd))};
}
FA_INLINE vi dot_nibbles(vi acc, vb lo, vb s_lo, vb hi, vb s_hi) {
    const __m256i p =
        _mm256_add_epi16(_mm256_maddubs_epi16(lo.v, s_lo.v), _mm256_maddubs_epi16(hi.v, s_hi.v));
    return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(p, _mm256_set1_epi16(1)))};
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn

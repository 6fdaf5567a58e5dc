// Bytes and integers of AVX-512, with VNNI dot products where the translation unit enables them.
#pragma once

namespace fastattn {
namespace FASTATTN_ISA {

struct vb {
    __m512i v;
};
struct vi {
    __m512i v;
};

FA_INLINE vb load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
FA_INLINE vb load_bytes_n(const void* p, int n) {
    return {_mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : (1ull << n) - 1, p)};
}
FA_INLINE vb hold(vb a) {
    asm("" : "+v"(a.v));
    return a;
}
FA_INLINE vb set1_byte(int x) { return {_mm512_set1_epi8(char(x))}; }
FA_INLINE void nibbles(vb a, vb& lo, vb& hi) {
    const __m512i mask = _mm512_set1_epi8(15);
    lo.v = _mm512_and_si512(a.v, mask);
    hi.v = _mm512_and_si512(_mm512_srli_epi16(a.v, 4), mask);
}

FA_INLINE vi load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
FA_INLINE void store_ints(int32_t* p, vi a) { _mm512_storeu_si512(p, a.v); }
FA_INLINE vi set1_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
FA_INLINE vi operator+(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
FA_INLINE vi operator-(vi a, vi b) { return {_mm512_sub_epi32(a.v, b.v)}; }
FA_INLINE vi operator^(vi a, vi b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int N>
FA_INLINE vi shift_left(vi a) {
    return {_mm512_slli_epi32(a.v, N)};
}
template <int N>
FA_INLINE vi shift_right(vi a) {
    return {_mm512_srli_epi32(a.v, N)};
}
FA_INLINE vf as_float(vi a) { return {_mm512_castsi512_ps(a.v)}; }
FA_INLINE vi as_int(vf a) { return {_mm512_castps_si512(a.v)}; }
FA_INLINE vi to_int(vf a) { return {_mm512_cvtps_epi32(a.v)}; }
FA_INLINE vi load_low_bytes(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
FA_INLINE void store_low_bytes(int8_t* p, vi a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }
FA_INLINE vf max_of_fours(vf a) {
    a = max(a, {_mm512_permute_ps(a.v, 0xb1)});
    return max(a, {_mm512_permute_ps(a.v, 0x4e)});
}
FA_INLINE void store_fours(float* p, vf a) {
    _mm_storeu_ps(p, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, a.v)));
}
constexpr int SPREAD = 16;
template <class T>
FA_INLINE vf spread(const T* p, vi index) {
    return {_mm512_permutexvar_ps(index.v, load(p).v)};
}

#if defined(__AVX512VNNI__)
constexpr int BYTE_BIAS = 128;
FA_INLINE vb biased(vb a) { return {_mm512_xor_si512(a.v, _mm512_set1_epi8(char(0x80)))}; }
FA_INLINE vi dot_bytes(vi acc, vb q, vb s) { return {_mm512_dpbusd_epi32(acc.v, q.v, s.v)}; }
FA_INLINE vi dot_nibbles(vi acc, vb lo, vb s_lo, vb hi, vb s_hi) {
    return dot_bytes(dot_bytes(acc, lo, s_lo), hi, s_hi);
}
#else
constexpr int BYTE_BIAS = 0;
FA_INLINE vb biased(vb a) { return a; }
FA_INLINE __m512i even_bytes(vb a) { return _mm512_srai_epi16(_mm512_slli_epi16(a.v, 8), 8); }
FA_INLINE __m512i odd_bytes(vb a) { return _mm512_srai_epi16(a.v, 8); }
FA_INLINE vi dot_bytes(vi acc, vb q, vb s) {
    const __m512i even = _mm512_madd_epi16(even_bytes(q), even_bytes(s));
    const __m512i odd = _mm512_madd_epi16(odd_bytes(q), odd_bytes(s));
    return {_mm512_add_epi32(acc.v, _mm512_add_epi32(even, odd))};
}
FA_INLINE vi dot_nibbles(vi acc, vb lo, vb s_lo, vb hi, vb s_hi) {
    const __m512i p =
        _mm512_add_epi16(_mm512_maddubs_epi16(lo.v, s_lo.v), _mm512_maddubs_epi16(hi.v, s_hi.v));
    return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(p, _mm512_set1_epi16(1)))};
}
#endif

}  // namespace FASTATTN_ISA
}  // namespace fastattn

// Bytes and integers in 16-byte vectors of the compiler.
#pragma once

namespace fastattn {
namespace FASTATTN_ISA {

typedef int8_t nb __attribute__((vector_size(16)));
typedef int16_t ns __attribute__((vector_size(16)));

struct vb {
    nb v;
};
struct vi {
    ni v;
};

FA_INLINE vb load_bytes(const void* p) {
    vb r;
    memcpy(&r.v, p, 16);
    return r;
}
FA_INLINE vb set1_byte(int x) { return {nb{} + int8_t(x)}; }
FA_INLINE void nibbles(vb a, vb& lo, vb& hi) {
    lo.v = a.v & 15;
    hi.v = (a.v >> 4) & 15;
}

FA_INLINE vi load_ints(const int32_t* p) {
    vi r;
    memcpy(&r.v, p, 16);
    return r;
}
FA_INLINE void store_ints(int32_t* p, vi a) { memcpy(p, &a.v, 16); }
FA_INLINE vi set1_int(int32_t x) { return {ni{x, x, x, x}}; }
typedef uint32_t nu __attribute__((vector_size(16)));  // additions that may wrap
FA_INLINE vi operator+(vi a, vi b) { return {(ni)((nu)a.v + (nu)b.v)}; }
FA_INLINE vi operator-(vi a, vi b) { return {(ni)((nu)a.v - (nu)b.v)}; }
FA_INLINE vi operator^(vi a, vi b) { return {a.v ^ b.v}; }
template <int N>
FA_INLINE vi shift_left(vi a) {
    return {(ni)((nu)a.v << N)};
}
template <int N>
FA_INLINE vi shift_right(vi a) {
    return {(ni)((nu)a.v >> N)};
}
FA_INLINE vf as_float(vi a) { return {(nf)a.v}; }
FA_INLINE vi as_int(vf a) { return {(ni)a.v}; }
FA_INLINE vi to_int(vf a) { return {__builtin_convertvector((a + copysign(set1(0.5f), a)).v, ni)}; }
FA_INLINE vi load_low_bytes(const uint8_t* p) { return {ni{p[0], p[1], p[2], p[3]}}; }
FA_INLINE void store_low_bytes(int8_t* p, vi a) {
    for (int i = 0; i < 4; i++) p[i] = int8_t(a.v[i]);
}
FA_INLINE vf max_of_fours(vf a) { return set1(reduce_max(a)); }
FA_INLINE void store_fours(float* p, vf a) { *p = a.v[0]; }
constexpr int SPREAD = 1;
template <class T>
FA_INLINE vf spread(const T* p, vi) {
    return set1(to_float(*p));
}

constexpr int BYTE_BIAS = 0;
FA_INLINE vb biased(vb a) { return a; }
// The bytes at even and at odd places, sign-extended.
FA_INLINE ns even_bytes(vb a) { return ((ns)a.v << 8) >> 8; }
FA_INLINE ns odd_bytes(vb a) { return (ns)a.v >> 8; }
// Sums of neighbours.
FA_INLINE ni pairs(ns a) { return (((ni)a << 16) >> 16) + ((ni)a >> 16); }
FA_INLINE vi dot_bytes(vi acc, vb q, vb s) {
    const ns even = even_bytes(q) * even_bytes(s), odd = odd_bytes(q) * odd_bytes(s);
    return acc + vi{pairs(even) + pairs(odd)};
}
FA_INLINE vi dot_nibbles(vi acc, vb lo, vb s_lo, vb hi, vb s_hi) {
    const ns even = even_bytes(lo) * even_bytes(s_lo) + even_bytes(hi) * even_bytes(s_hi);
    const ns odd = odd_bytes(lo) * odd_bytes(s_lo) + odd_bytes(hi) * odd_bytes(s_hi);
    return acc + vi{pairs(even + odd)};
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn

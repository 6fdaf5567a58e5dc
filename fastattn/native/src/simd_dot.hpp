// Integers in the SIMD layer: `vb` of 4 W bytes and `vi` of W 32-bit lanes, which wrap around.
//
//   load_bytes(p)                    4 W bytes; load_bytes_n(p, n): the first n, others 0
//   hold(a)                          a, in a register where there are enough: not loaded again at each use
//   nibbles(a, lo, hi)               the low and the high half of each byte, 0..15
//   biased(a)                        signed bytes as dot_bytes takes them: BYTE_BIAS is added to each
//   dot_bytes(acc, q, s)             lane i of acc plus the products of bytes 4 i .. 4 i + 3; q: of `biased`
//   dot_nibbles(acc, lo, s, hi, t)   the same of lo * s and of hi * t
//   load_ints store_ints set1_int + - ^ shift_left<N> shift_right<N> (logical)
//   as_float as_int                  the same bits; to_int(a): the nearest integer
//   load_low_bytes(p)                W bytes as 0..255; store_low_bytes(p, a): the low byte of each lane
//   max_of_fours(a)                  each lane: the largest of its 4 j .. 4 j + 3
//   store_fours(p, a)                lanes 0, 4, 8 ..: W / 4 floats
//   spread(p, index)                 lane i: p[index[i]] of float or f16; p[0 .. SPREAD - 1] is read, and
//                                    index is in that range
#pragma once

#include "simd.hpp"

#if defined(FASTATTN_SIMD_AVX512)
#include "simd_dot_avx512.hpp"
#elif defined(FASTATTN_SIMD_AVX2)
#include "simd_dot_avx2.hpp"
#elif defined(FASTATTN_SIMD_NEON)
#include "simd_dot_neon.hpp"
#else
#include "simd_dot_portable.hpp"
#endif

#if !defined(FASTATTN_SIMD_AVX512)
namespace fastattn {
namespace FASTATTN_ISA {

FA_INLINE vb hold(vb a) { return a; }
static __attribute__((noinline)) vb load_first_bytes(const void* p, int n) {
    alignas(64) uint8_t buffer[4 * W] = {};
    memcpy(buffer, p, size_t(n));
    return load_bytes(buffer);
}
FA_INLINE vb load_bytes_n(const void* p, int n) { return n < 4 * W ? load_first_bytes(p, n) : load_bytes(p); }

}  // namespace FASTATTN_ISA
}  // namespace fastattn
#endif

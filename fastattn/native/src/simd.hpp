// The SIMD layer: one vector type `vf` of W float lanes per instruction set, and the same functions on it.
//
// The including translation unit is compiled with -DFASTATTN_ISA=<name> and the matching -m flags; all of
// this lives in namespace fastattn::<name>, so that the copies never meet at link time. Kernels include
// nothing from the standard C++ library (its templates would be merged across instruction sets).
//
//   load(p) store(p, v)              W elements of float, f16 or bf16 <-> float lanes; to nearest even
//   load_n(p, n) store_n(p, v, n)    the first n < W elements: others load as 0, memory past n untouched
//   load_i8(p)                       W integers to float lanes
//   load_nibbles(p, lo, hi)          W bytes: low nibbles to lo, high nibbles to hi, as 0..15
//   zero() set1(x) + - * / min max abs copysign round ldexp
//   fma(a, b, c) fnma(a, b, c)       a * b + c, c - a * b
//   lt(a, b)                         a mask `vm`; select(m, a, b) = m ? a : b
//   reduce_add reduce_max            over the lanes of a vector
//   transpose_sum(W vectors)         lane i: the sum of vector i
//   transpose(W vectors)             in place
//   exp2 exp tanh sigmoid            about 1 ulp over the whole range, NaN and infinities as libm
//   to_float(x) from_float<T>(x)     scalars
#pragma once

#include <string.h>

#include "common.hpp"

#define FA_INLINE static inline __attribute__((always_inline))
#define FA_INLINE_MEMBER inline __attribute__((always_inline))

#if !defined(FASTATTN_ISA)
#error "compile with -DFASTATTN_ISA=<name>"
#endif

#if defined(FASTATTN_SIMD_AVX512)
#include "simd_avx512.hpp"
#elif defined(FASTATTN_SIMD_AVX2)
#include "simd_avx2.hpp"
#elif defined(FASTATTN_SIMD_NEON)
#include "simd_neon.hpp"
#else
#include "simd_portable.hpp"
#endif

#include "simd_math.hpp"

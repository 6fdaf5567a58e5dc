// What products sum over: units of one float, or of a pair of bf16 that one BF16 dot product takes.
//
//   load_units(p)      W units, one a lane
//   spread(p)          one unit in every lane
//   dot(a, b, c)       c + a . b in each lane, in float
#pragma once

#include "simd.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

struct Floats {
    using Unit = float;
    using Vector = vf;
    static constexpr int STEP = 1;  // elements of a unit
    FA_INLINE Vector load_units(const Unit* p) { return load(p); }
    FA_INLINE Vector spread(const Unit* p) { return set1(*p); }
    FA_INLINE vf dot(Vector a, Vector b, vf c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
    using Unit = uint32_t;
    using Vector = __m512i;
    static constexpr int STEP = 2;
    FA_INLINE Vector load_units(const Unit* p) { return _mm512_loadu_si512(p); }
    FA_INLINE Vector spread(const Unit* p) { return _mm512_set1_epi32(int(*p)); }
    FA_INLINE vf dot(Vector a, Vector b, vf c) { return {_mm512_dpbf16_ps(c.v, (__m512bh)a, (__m512bh)b)}; }
};
#endif

}  // namespace FASTATTN_ISA
}  // namespace fastattn

// Arithmetic on sizes and offsets.
#pragma once

#include "simd.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

FA_INLINE int64_t imin(int64_t a, int64_t b) { return a < b ? a : b; }
FA_INLINE int64_t imax(int64_t a, int64_t b) { return a > b ? a : b; }
FA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FA_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace FASTATTN_ISA
}  // namespace fastattn

// The index of each row's largest value: the greedy choice of a token.
#pragma once

#include "ops_table.hpp"
#include "simd.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// As numpy's argmax: the first of equal values, and a NaN is larger than any number.
template <class T>
static int64_t first_largest(const T* x, int64_t n) {
    int64_t at = 0;
    for (int64_t i = 0; i < n; i++) {
        const float value = to_float(x[i]), best = to_float(x[at]);
        if (value != value) return i;
        if (value > best) at = i;
    }
    return at;
}

template <class T>
static int64_t largest(const T* x, int64_t n) {
    constexpr int64_t BLOCK = 64 * W;
    const int64_t whole = n - n % W;
    if (!whole) return first_largest(x, n);
    vf invalid = zero();
    int64_t found = 0;  // the first block with the largest value
    float best = 0.0f;
    for (int64_t lo = 0; lo < whole; lo += BLOCK) {
        const int64_t hi = lo + BLOCK < whole ? lo + BLOCK : whole;
        vf most = load(x + lo);
        for (int64_t i = lo; i < hi; i += W) {
            const vf v = load(x + i);
            most = max(v, most);
            invalid = invalid + (v - v);
        }
        const float value = reduce_max(most);
        if (lo == 0 || value > best) best = value, found = lo;
    }
    if (reduce_add(invalid) != 0.0f) return first_largest(x, n);  // infinities and NaN
    const int64_t end = found + BLOCK < whole ? found + BLOCK : whole;
    const int64_t at = found + first_largest(x + found, end - found);
    if (whole == n) return at;
    const int64_t last = whole + first_largest(x + whole, n - whole);
    const float value = to_float(x[last]);
    return value > best || value != value ? last : at;
}

template <class T>
static void argmax_rows(const ArgmaxArgs& a) {
    for (int64_t r = 0; r < a.rows; r++)
        a.out[r] = largest(static_cast<const T*>(a.x) + r * a.width, a.width);
}

static void argmax(const ArgmaxArgs& a) {
    if (a.dtype == DType::f32) return argmax_rows<float>(a);
    if (a.dtype == DType::f16) return argmax_rows<f16>(a);
    argmax_rows<bf16>(a);
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

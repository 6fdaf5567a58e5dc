// The sum of the ranks' partial results.
#pragma once

#include "ops_table.hpp"
#include "simd.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

template <class T>
static void sum_of(const SumArgs& a) {
    const auto part = [&](int64_t p) { return static_cast<const T*>(a.parts[p]); };
    T* out = static_cast<T*>(a.out);
    int64_t i = 0;
    for (; i + W <= a.n; i += W) {
        vf total = load(part(0) + i);
        for (int64_t p = 1; p < a.count; p++) total = total + load(part(p) + i);
        store(out + i, total);
    }
    if (const int n = int(a.n - i)) {
        vf total = load_n(part(0) + i, n);
        for (int64_t p = 1; p < a.count; p++) total = total + load_n(part(p) + i, n);
        store_n(out + i, total, n);
    }
}

static void sum(const SumArgs& a) {
    if (a.dtype == DType::f32) return sum_of<float>(a);
    if (a.dtype == DType::f16) return sum_of<f16>(a);
    sum_of<bf16>(a);
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

// The columns of x in another order: the input of a layer whose columns were sorted by group (act-order).
#pragma once

#include "ops_table.hpp"
#include "parallel.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

template <class T>
static void gather_values(const GatherArgs& a, int threads) {
    const T* x = static_cast<const T*>(a.x);
    T* out = static_cast<T*>(a.out);
    parallel_ranges(a.rows * a.width, 64, threads, [&](int64_t lo, int64_t hi, int) {
        while (lo < hi) {
            const int64_t row = lo / a.width, first = row * a.width;
            const int64_t end = first + a.width < hi ? first + a.width : hi;
            for (; lo < end; lo++) out[lo] = x[row * a.x_stride + a.order[lo - first]];
        }
    });
}

static void gather(const GatherArgs& a, int threads) {
    if (a.dtype == DType::f32) return gather_values<uint32_t>(a, threads);
    gather_values<uint16_t>(a, threads);
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

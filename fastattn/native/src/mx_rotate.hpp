// The block Hadamard rotation of messages: Sylvester's matrix, orthonormal, its own inverse.
#pragma once

#include "mx_element.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Lane i and its partner i ^ STEP become their sum (the lower of the two) and their difference.
template <int STEP>
FA_INLINE lanes butterfly(lanes a) {
    const ilanes number = lane_numbers();
    const lanes other = __builtin_shuffle(a, number ^ STEP);
    // a - b as b' + (-a'): the same sum in either lane.
    const ilanes flip = (number & STEP) != 0 ? ilanes{} + INT32_MIN : ilanes{};
    return other + (lanes)((ilanes)a ^ flip);
}

// Each whole block of `length` (a power of two, at least 32) of x (n,), in place; the tail is not rotated.
static void rotate_row(float* x, int64_t n, int length) {
    const float factor = float(1.0 / __builtin_sqrt(double(length)));
    for (float* end = x + n / length * length; x < end; x += length) {
        for (int i = 0; i < length; i += W) {
            lanes a = load_lanes(x + i);
            a = butterfly<1>(a);
            a = butterfly<2>(a);
            if constexpr (W > 4) a = butterfly<4>(a);
            if constexpr (W > 8) a = butterfly<8>(a);
            store_lanes(x + i, a);
        }
        for (int step = W; step < length; step *= 2)
            for (int i = 0; i < length; i += 2 * step)
                for (int k = i; k < i + step; k += W) {
                    const lanes a = load_lanes(x + k), b = load_lanes(x + k + step);
                    store_lanes(x + k, a + b);
                    store_lanes(x + k + step, a - b);
                }
        for (int i = 0; i < length; i += W) store_lanes(x + i, load_lanes(x + i) * factor);
    }
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

// The bias of a linear layer: halves or floats, or none.
#pragma once

#include "primitives.cuh"

namespace volta {

VOLTA_DEVICE float bias(const void* values, i32 is_float, i64 n) {
    if (!values) return 0.0f;
    return is_float ? ldg(static_cast<const float*>(values) + n)
                    : from_half(ldg(static_cast<const u16*>(values) + n));
}

}  // namespace volta

// A matrix of low-bit integers in groups: w = scales * q + mins, per row and group of columns.
//
// BITS = 4: 32 columns take 16 bytes; byte j holds column j in its low nibble and column j + 16 in its high
// one, q in 0..15. BITS = 8: a byte a column, q in -128..127. Column c belongs to group
// (c + group_offset) / group_size, or to g_idx[c].
#pragma once

#include "primitives.cuh"

namespace volta {

// Mirrored by cuda_volta/weights.py.
struct WeightParams {
    const u8* codes;
    const void* scales;  // (out, groups), halves or floats
    const void* mins;    // as scales; null: 0
    const i32* g_idx;    // null: groups are contiguous
    i64 codes_row;       // bytes
    i64 scales_row, mins_row;
    i32 out, in, group_size, group_offset, groups;
    i32 scale_is_float;
};

VOLTA_DEVICE i32 column_group(const WeightParams& w, i32 c) {
    const i32 g = w.g_idx ? ldg(w.g_idx + c) : (c + w.group_offset) / w.group_size;
    return g < 0 ? 0 : g < w.groups ? g : w.groups - 1;
}

struct Grid {
    float scale, min;
};
VOLTA_DEVICE Grid group_grid(const WeightParams& w, i64 row, i32 group) {
    const i64 s = row * w.scales_row + group;
    const i64 m = row * w.mins_row + group;
    if (w.scale_is_float) {
        return {ldg(static_cast<const float*>(w.scales) + s),
                w.mins ? ldg(static_cast<const float*>(w.mins) + m) : 0.0f};
    }
    return {from_half(ldg(static_cast<const u16*>(w.scales) + s)),
            w.mins ? from_half(ldg(static_cast<const u16*>(w.mins) + m)) : 0.0f};
}

}  // namespace volta

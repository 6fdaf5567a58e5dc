// Rotary position embedding (Su et al., RoFormer, equation 34) of one element of a head.
#pragma once

#include "primitives.cuh"

namespace volta {

struct RotaryTable {
    const float* cos;  // (positions, half); null: nothing is rotated
    const float* sin;
    const i64* at;  // position of each row
    i32 positions, half, interleaved;
};

// The angles of a row; a position outside the table is the nearest in it.
struct Angles {
    const float* cos;
    const float* sin;
};
VOLTA_DEVICE Angles row_angles(const RotaryTable& t, i64 row) {
    if (!t.cos) return {nullptr, nullptr};
    i64 position = ldg(t.at + row);
    position = position < 0 ? 0 : position >= t.positions ? t.positions - 1 : position;
    return {t.cos + position * t.half, t.sin + position * t.half};
}

// Element d of the rotated head x: pairs are (i, i + half), or (2i, 2i + 1) where interleaved.
VOLTA_DEVICE float rotated(const u16* x, i32 d, const RotaryTable& t, Angles angles) {
    const float own = from_half(ldg(x + d));
    if (!angles.cos || d >= 2 * t.half) return own;
    const bool second = t.interleaved ? d & 1 : d >= t.half;
    const i32 i = t.interleaved ? d >> 1 : second ? d - t.half : d;
    const i32 partner = t.interleaved ? d ^ 1 : second ? d - t.half : d + t.half;
    const float other = from_half(ldg(x + partner)) * ldg(angles.sin + i);
    return own * ldg(angles.cos + i) + (second ? other : -other);
}

}  // namespace volta

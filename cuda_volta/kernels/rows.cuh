// Rows of halves, 8 elements at a time: as one 128-bit access where every row of the tensor allows it.
#pragma once

#include "primitives.cuh"

namespace volta {

struct Octet {
    float x[8];
};

VOLTA_DEVICE Octet unpack_octet(Word4 w) {
    return {{low_half(w.x), high_half(w.x), low_half(w.y), high_half(w.y), low_half(w.z), high_half(w.z),
             low_half(w.w), high_half(w.w)}};
}
VOLTA_DEVICE Word4 pack_octet(const Octet& o) {
    return {pack_half2(o.x[0], o.x[1]), pack_half2(o.x[2], o.x[3]), pack_half2(o.x[4], o.x[5]),
            pack_half2(o.x[6], o.x[7])};
}

// Elements at p of which `present` exist; the others are 0. `wide`: p is a multiple of 16 bytes.
VOLTA_DEVICE Octet load_octet(const u16* p, i64 present, bool wide) {
    if (wide && present >= 8) return unpack_octet(ldg(reinterpret_cast<const Word4*>(p)));
    Octet o;
#pragma unroll
    for (int i = 0; i < 8; ++i) o.x[i] = i < present ? from_half(ldg(p + i)) : 0.0f;
    return o;
}
VOLTA_DEVICE Octet load_octet(const float* p, i64 present) {
    Octet o;
#pragma unroll
    for (int i = 0; i < 8; ++i) o.x[i] = i < present ? ldg(p + i) : 0.0f;
    return o;
}
VOLTA_DEVICE void store_octet(u16* p, i64 present, bool wide, const Octet& o) {
    if (wide && present >= 8) {
        stg(reinterpret_cast<Word4*>(p), pack_octet(o));
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i < present) stg(p + i, to_half(o.x[i]));
    }
}

}  // namespace volta

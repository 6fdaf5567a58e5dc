// RMSNorm of x + residual, and that sum (spec: rms_norm). A block has one row.
#include "rows.cuh"

namespace volta {

struct NormParams {
    const u16* x;
    const u16* residual;  // null: none
    const void* weight;   // halves, or floats
    u16* out;             // rows of `width`, dense, as is `total`
    u16* total;
    i64 x_row, residual_row;
    i32 width, weight_is_float, wide;
    float eps;
};

constexpr i32 NORM_THREADS = 256;

// The same sum in every thread, added in the same order in every run.
VOLTA_DEVICE float block_sum(float x) {
#pragma unroll
    for (u32 mask = 16; mask; mask >>= 1) x += shuffle_xor(x, mask);
    if (lane_index() == 0) sts32(shared_base() + warp_index() * 4, float_bits(x));
    barrier();
    float sum = 0.0f;
#pragma unroll
    for (u32 w = 0; w < NORM_THREADS / 32; ++w) sum += bits_float(lds32(shared_base() + w * 4));
    return sum;
}

}  // namespace volta

using namespace volta;

VOLTA_KERNEL(rms_norm, 256, 4)(NormParams p) {
    const i64 row = block_x();
    const u16* const x = p.x + row * p.x_row;
    const u16* const residual = p.residual ? p.residual + row * p.residual_row : nullptr;
    u16* const out = p.out + row * p.width;
    u16* const total = p.total + row * p.width;
    const i32 first = static_cast<i32>(thread_index()) * 8;

    float squares = 0.0f;
    for (i32 c = first; c < p.width; c += NORM_THREADS * 8) {
        Octet s = load_octet(x + c, p.width - c, p.wide);
        if (residual) {
            const Octet r = load_octet(residual + c, p.width - c, p.wide);
#pragma unroll
            for (int i = 0; i < 8; ++i) s.x[i] = from_half(to_half(s.x[i] + r.x[i]));
            store_octet(total + c, p.width - c, p.wide, s);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) squares += s.x[i] * s.x[i];
    }
    const float scale = rsqrt_approx(block_sum(squares) * rcp_approx(static_cast<float>(p.width)) + p.eps);

    for (i32 c = first; c < p.width; c += NORM_THREADS * 8) {
        const i32 present = p.width - c;
        Octet s = load_octet((residual ? total : x) + c, present, p.wide);
        const Octet w = p.weight_is_float
                            ? load_octet(static_cast<const float*>(p.weight) + c, present)
                            : load_octet(static_cast<const u16*>(p.weight) + c, present, p.wide);
#pragma unroll
        for (int i = 0; i < 8; ++i) s.x[i] *= scale * w.x[i];
        store_octet(out + c, present, p.wide, s);
    }
}

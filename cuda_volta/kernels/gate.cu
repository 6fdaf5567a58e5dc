// silu(gate) * up of rows that hold gate, then up (spec: swiglu).
#include "rows.cuh"

namespace volta {

struct GateParams {
    const u16* x;
    u16* out;  // (rows, width), dense
    i64 x_row;
    i32 width, wide;
};

}  // namespace volta

using namespace volta;

// Grid: (rows, width / 8 / threads); a thread has 8 columns.
VOLTA_KERNEL(swiglu, 256, 4)(GateParams p) {
    const i64 row = block_x();
    const i32 c = static_cast<i32>(block_y() * 256 + thread_index()) * 8;
    if (c >= p.width) return;
    const u16* const x = p.x + row * p.x_row + c;
    Octet gate = load_octet(x, p.width - c, p.wide);
    const Octet up = load_octet(x + p.width, p.width - c, p.wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float e = exp2_approx(-1.4426950408889634f * gate.x[i]);
        gate.x[i] = gate.x[i] * rcp_approx(1.0f + e) * up.x[i];
    }
    store_octet(p.out + row * p.width + c, p.width - c, p.wide, gate);
}

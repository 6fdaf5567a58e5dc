// Columns of x in the order of a weight's stored columns (act-order).
#include "primitives.cuh"

namespace volta {

struct PermuteParams {
    const u16* x;
    const i32* x_perm;  // column c of the result is column x_perm[c * perm_stride] of x, clamped
    u16* out;           // (rows, width), dense
    i64 x_row;
    i32 width, perm_stride;
};

}  // namespace volta

using namespace volta;

// Grid: (rows, width / threads).
VOLTA_KERNEL(permute, 256, 4)(PermuteParams p) {
    const i32 c = static_cast<i32>(block_y() * 256 + thread_index());
    if (c >= p.width) return;
    const i64 row = block_x();
    i32 from = ldg(p.x_perm + static_cast<i64>(c) * p.perm_stride);
    from = from < 0 ? 0 : from < p.width ? from : p.width - 1;
    stg(p.out + row * p.width + c, ldg(p.x + row * p.x_row + from));
}

// Rotary position embedding of x (rows, heads, head_dim) (spec: rotary). A block has one row.
#include "rotary.cuh"

namespace volta {

struct RotaryParams {
    const u16* x;
    u16* out;  // dense
    RotaryTable table;
    i64 x_row, x_head;
    i32 heads, head_dim;
};

}  // namespace volta

using namespace volta;

VOLTA_KERNEL(rotary, 256, 4)(RotaryParams p) {
    const i64 row = block_x();
    const Angles angles = row_angles(p.table, row);
    const i32 width = p.heads * p.head_dim;
    for (i32 i = static_cast<i32>(thread_index()); i < width; i += 256) {
        const u16* const head = p.x + row * p.x_row + i / p.head_dim * p.x_head;
        stg(p.out + row * width + i, to_half(rotated(head, i % p.head_dim, p.table, angles)));
    }
}

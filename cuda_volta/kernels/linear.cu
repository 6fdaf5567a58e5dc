// x W^T for up to 16 rows of x at a time and a grouped low-bit W: one pass over W, bound by its bytes.
//
// Each 16 bytes of codes share a group, so nothing is subtracted or scaled before the product: with z = 1024
// (1152 for signed codes), which the operands are too large by (linear.cuh),
//     sum x (scale q + min) = scale sum x (q + z) + (min - z scale) sum x,
// in float32, once for every 16 bytes. A panel's x, the sums of x and the scales go to shared memory, while
// every warp keeps a panel of its codes in flight.
#include "linear.cuh"

namespace volta {

// x / group_size, x below group_size + COLUMNS.
VOLTA_DEVICE i32 groups_before(i32 x, u32 inverse) {
    return static_cast<i32>(static_cast<u64>(static_cast<u32>(x)) * inverse >> 32);
}

// Adds a step's products of 8 rows of x, scaled, to the sums: columns n, n + 1, n + 4, n + 5 of a lane.
VOLTA_DEVICE void add_scaled(float (&sums)[8], const float (&products)[8], const Word4 (&grids)[2],
                             u32 x_sums) {
    const Word2 first = lds64(x_sums);
    const Word2 second = lds64(x_sums + 128);
    const float x[2] = {bits_float(first.x) + bits_float(second.x),
                        bits_float(first.y) + bits_float(second.y)};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const Word4 g = grids[i >> 2];
        const float scale = bits_float(i & 1 ? g.z : g.x);
        const float min = bits_float(i & 1 ? g.w : g.y);
        sums[i] += scale * products[i];
        sums[i] += min * x[i >> 1 & 1];
    }
}

}  // namespace volta

using namespace volta;

// Grid: (row tiles * ceil(out / 64), splits); the row tiles of the same weights are neighbours.
VOLTA_KERNEL(linear, 256, 2)(LinearParams p) {
    const u32 lane = lane_index();
    const Tile tile = block_tile(p);
    const u8* const codes_row = lane_codes(p, tile);
    const u32 grids = shared_base() + X_BYTES + SUM_BYTES;
    // A lane's sums of x in a step, and its entries of a group: see add_scaled.
    const u32 my_x_sums = shared_base() + X_BYTES + ((lane & 28) + (lane & 1) * 2) * 4;
    const u32 my_grids = grids + (warp_index() * 8 + (lane & 2)) * 8;
    const i32 my_quad = static_cast<i32>(quadpair(lane)) * QUAD_COLUMNS;

    float sums[2][8] = {};
    Word4 codes[PANEL];
#pragma unroll
    for (int t = 0; t < PANEL; ++t)
        codes[t] = load_codes(p.w, codes_row, tile.begin * COLUMNS + t * STEP + my_quad);
#pragma unroll 1
    for (i32 panel = tile.begin; panel < tile.end; ++panel) {
        const i32 first = panel * COLUMNS;
        const i32 last = first + COLUMNS < p.w.in ? first + COLUMNS - 1 : p.w.in - 1;
        const i32 first_group = (first + p.w.group_offset) / p.w.group_size;
        const i32 inside = first + p.w.group_offset - first_group * p.w.group_size;  // of the first group
        store_x<true>(p, shared_base(), tile, panel);
        store_grids(p.w, grids, tile.first_n, first_group,
                    groups_before(last - first + inside, p.group_inverse) + 1);
        barrier();
#pragma unroll
        for (int t = 0; t < PANEL; ++t) {
            const i32 c = first + t * STEP + my_quad;
            const i32 group = groups_before((c < p.w.in ? c : last) - first + inside, p.group_inverse);
            const u32 grid = my_grids + static_cast<u32>(group) * GROUP_PITCH;
            const Word4 scaling[2] = {lds128(grid), lds128(grid + 32)};
            const u32 words[4] = {codes[t].x, codes[t].y, codes[t].z, codes[t].w};
            codes[t] = load_codes(p.w, codes_row, panel + 1 < tile.end ? c + COLUMNS : p.w.in);
            Word2 b[4][2];
#pragma unroll
            for (int j = 0; j < 4; ++j) column_operands(b[j], words[j]);
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                if (m == tile.operands) continue;
                const u32 at = shared_base() + (t * 2 + m) * OPERANDS * 512 + lane * 16;
                float products[8] = {};
#pragma unroll
                for (int j = 0; j < OPERANDS; ++j) {
                    const Word4 x = lds128(at + j * 512);
#if BITS == 4
                    mma_rc(products, {x.x, x.y}, b[j][0]);
                    mma_rc(products, {x.z, x.w}, b[j][1]);
#else
                    mma_rc(products, {x.x, x.y}, b[2 * j][0]);
                    mma_rc(products, {x.z, x.w}, b[2 * j + 1][0]);
#endif
                }
                add_scaled(sums[m], products, scaling, my_x_sums + (t * 2 + m) * 256);
            }
        }
        barrier();
    }
    write_sums(p, tile, sums);
}

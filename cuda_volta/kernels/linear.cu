// x W^T for up to 16 rows of x at a time and a grouped low-bit W: one pass over W, bound by its bytes.
//
// Each 16 bytes of codes share a group, so nothing is subtracted or scaled before the product: with z = 1024
// (1152 for signed codes), which the operands are too large by (linear.cuh),
//     sum x (scale q + min) = scale sum x (q + z) + (min - z scale) sum x,
// in float32: the first term once for every 16 bytes, and the second as well, or, where a step's columns share
// a group, once for a panel, in which each quadpair takes one of the four steps.
//
// A warp has two tiles of 8 rows of W, which share what it reads of x. A panel's x, the sums of x and the
// scales go to shared memory; a step of codes is in flight ahead.
#include "linear.cuh"

namespace volta {

constexpr i32 TILES = 2;              // of 8 rows of W, a warp
constexpr i32 BLOCK_N = TILES * 64;
// Of the scales, or minima, of a group. Two quadpairs that read neighbouring groups meet no bank twice.
constexpr u32 GROUP_PITCH = BLOCK_N * 4 + 32;
constexpr i32 MOST_GROUPS = COLUMNS / QUAD_COLUMNS + 4;  // of a panel: one more than chunks, in fours
constexpr u32 SCALE_BYTES = MOST_GROUPS * GROUP_PITCH;

// x / group_size, x below group_size + COLUMNS.
VOLTA_DEVICE i32 groups_before(i32 x, u32 inverse) {
    return static_cast<i32>(static_cast<u64>(static_cast<u32>(x)) * inverse >> 32);
}

// Four groups of a block's rows on their way to shared memory: two rows' a thread. Neighbouring lanes have
// neighbouring groups, which lie beside each other in memory; groups behind the last one repeat it.
struct Groups {
    Grid grids[2];
};
VOLTA_DEVICE Groups load_groups(const WeightParams& w, i32 first_n, i32 first_group) {
    Groups four;
    const i32 group = first_group + static_cast<i32>(thread_index() & 3);
#pragma unroll
    for (int u = 0; u < 2; ++u) {
        const i32 n = first_n + static_cast<i32>(thread_index() >> 2) + u * 64;
        four.grids[u] = coded_grid(w, n, group < w.groups ? group : w.groups - 1);
    }
    return four;
}
// Scales, and behind them minima. Of 8 rows those of a lane's accumulators, n, n + 1, n + 4 and n + 5, are
// neighbours.
VOLTA_DEVICE void store_groups(u32 base, const Groups& four) {
    const u32 n = thread_index() >> 2;
    const u32 place = (n & ~6u) | (n & 2) << 1 | (n & 4) >> 1;
    const u32 to = base + (thread_index() & 3) * GROUP_PITCH + place * 4;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
        sts32(to + u * 256, float_bits(four.grids[u].scale));
        sts32(to + u * 256 + SCALE_BYTES, float_bits(four.grids[u].min));
    }
}

// Adds factors[column] * values to 8 accumulators: `values` of each, or of their two rows.
VOLTA_DEVICE float of_column(Word4 factors, int i) {
    return bits_float(i & 4 ? (i & 1 ? factors.w : factors.z) : (i & 1 ? factors.y : factors.x));
}
VOLTA_DEVICE void add_scaled(float (&sums)[8], const float (&products)[8], Word4 scales) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += of_column(scales, i) * products[i];
}
VOLTA_DEVICE void add_minima(float (&sums)[8], Word4 minima, u32 x_sums) {
    const Word2 first = lds64(x_sums);
    const Word2 second = lds64(x_sums + 128);
    const float x[2] = {bits_float(first.x) + bits_float(second.x),
                        bits_float(first.y) + bits_float(second.y)};
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += of_column(minima, i) * x[i >> 1 & 1];
}

}  // namespace volta

using namespace volta;

// Grid: (row tiles * ceil(out / BLOCK_N), splits); the row tiles of the same weights are neighbours.
VOLTA_KERNEL(linear, 256, 2)(LinearParams p) {
    const u32 lane = lane_index();
    const Tile tile = block_tile<BLOCK_N>(p);
    const i32 first_n = tile.first_n + static_cast<i32>(warp_index()) * TILES * 8;
    const u32 grids = shared_base() + X_BYTES + SUM_BYTES;
    // A lane's sums of x in a step, and its entries of a group.
    const u32 my_x_sums = shared_base() + X_BYTES + ((lane & 28) + (lane & 1) * 2) * 4;
    const u32 my_grids = grids + warp_index() * TILES * 32 + (lane & 2) * 8;
    const i32 my_quad = static_cast<i32>(quadpair(lane)) * QUAD_COLUMNS;

    float sums[TILES][2][8] = {};
    // Of the codes in flight; pointers that move on cost less than addresses made from columns.
    i32 column = tile.begin * COLUMNS + my_quad;
    const i32 end = tile.end * COLUMNS < p.w.in ? tile.end * COLUMNS : p.w.in;
    const u8* at[TILES];
    Word4 next[TILES];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        at[i] = lane_codes(p, first_n + i * 8) + static_cast<i64>(column) * BITS / 8;
        next[i] = load_codes(at[i], column < end);
    }
    i32 first_group = (tile.begin * COLUMNS + p.w.group_offset) / p.w.group_size;
    i32 inside = tile.begin * COLUMNS + p.w.group_offset - first_group * p.w.group_size;  // of the first group
#pragma unroll 1
    for (i32 panel = tile.begin; panel < tile.end; ++panel) {
        const i32 first = panel * COLUMNS;
        const PanelX x = load_panel(p, tile, panel);
        const Groups four = load_groups(p.w, tile.first_n, first_group);
        store_x<true>(p, shared_base(), tile, x);
        store_groups(grids, four);
        const i32 more = groups_before(inside + COLUMNS - 1, p.group_inverse);  // groups, but for the first
#pragma unroll 1
        for (i32 g = 4; g <= more; g += 4)
            store_groups(grids + static_cast<u32>(g) * GROUP_PITCH,
                         load_groups(p.w, tile.first_n, first_group + g));
        barrier();
        // Not unrolled: four copies would not fit the instruction cache near a sub-core.
#pragma unroll 1
        for (i32 t = 0; t < PANEL; ++t) {
            const i32 group = groups_before(inside + column - first, p.group_inverse);
            const u32 grid = my_grids + static_cast<u32>(group) * GROUP_PITCH;
            column += STEP;
            Word2 b[TILES][4][2];
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                const u32 words[4] = {next[i].x, next[i].y, next[i].z, next[i].w};
#pragma unroll
                for (int j = 0; j < 4; ++j) column_operands(b[i][j], words[j]);
                at[i] += STEP * BITS / 8;
                next[i] = load_codes(at[i], column < end);
            }
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                if (m == tile.operands) continue;
                const u32 x_at = shared_base() + static_cast<u32>(t * 2 + m) * OPERANDS * 512 + lane * 16;
                float products[TILES][8] = {};
#pragma unroll
                for (int j = 0; j < OPERANDS; ++j) {
                    const Word4 a = lds128(x_at + j * 512);
#pragma unroll
                    for (int i = 0; i < TILES; ++i) {
#if BITS == 4
                        mma_rc(products[i], {a.x, a.y}, b[i][j][0]);
                        mma_rc(products[i], {a.z, a.w}, b[i][j][1]);
#else
                        mma_rc(products[i], {a.x, a.y}, b[i][2 * j][0]);
                        mma_rc(products[i], {a.z, a.w}, b[i][2 * j + 1][0]);
#endif
                    }
                }
#pragma unroll
                for (int i = 0; i < TILES; ++i) {
                    add_scaled(sums[i][m], products[i], lds128(grid + i * 32));
                    if (!p.whole_steps)
                        add_minima(sums[i][m], lds128(grid + SCALE_BYTES + i * 32), my_x_sums + (t * 2 + m) * 256);
                }
            }
        }
        if (p.whole_steps) {
            const i32 t = static_cast<i32>(quadpair(lane));
            const i32 group = groups_before(inside + t * STEP, p.group_inverse);
            const u32 grid = my_grids + SCALE_BYTES + static_cast<u32>(group) * GROUP_PITCH;
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                if (m == tile.operands) continue;
#pragma unroll
                for (int i = 0; i < TILES; ++i)
                    add_minima(sums[i][m], lds128(grid + i * 32), my_x_sums + static_cast<u32>(t * 2 + m) * 256);
            }
        }
        inside += COLUMNS;
        const i32 passed = groups_before(inside, p.group_inverse);
        first_group += passed;
        inside -= passed * p.w.group_size;
        barrier();
    }
#pragma unroll
    for (int i = 0; i < TILES; ++i) write_sums(p, tile, first_n + i * 8, sums[i]);
}

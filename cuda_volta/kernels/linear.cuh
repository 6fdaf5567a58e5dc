// What the linear kernels share: x of a panel of columns in shared memory, codes as operands of the tensor
// cores, and the end, where the quadpairs' sums meet.
//
// A warp has 8 rows of W or more, the column operand of m8n8k4; x is the row operand. Quadpair q takes every fourth
// 16 bytes of codes, so that a load covers 64 contiguous bytes of each row, and its own sums over them.
// Integers become halves by the exponent trick (Kim et al., "Who Says Elephants Can't Run", 2022): OR-ing q
// into the mantissa of 1024 gives 1024 + q. The nibbles that share a word of the result are columns 0, 2 and
// 1, 3 of four, so x waits in shared memory in that order.
//
// A block walks over panels of PANEL steps of columns.
#pragma once

#include "bias.cuh"
#include "quadpair.cuh"
#include "weight.cuh"

namespace volta {

struct LinearParams {
    WeightParams w;
    const u16* x;
    const void* bias;  // halves, or floats; null: none
    u16* out;          // (rows, out), dense
    float* partial;    // (splits, rows, out) where splits > 1
    i64 x_row;
    i32 rows, wide;  // wide: rows of x begin at multiples of 16 bytes
    i32 bias_is_float, splits;
    u32 group_inverse;  // ceil(2^32 / group_size); 0: there is one group
    i32 whole_steps;    // all columns of a step are of one group
};

constexpr i32 QUAD_COLUMNS = 128 / BITS;  // of the 16 bytes that a lane loads
constexpr i32 STEP = 4 * QUAD_COLUMNS;
constexpr i32 PANEL = 4;  // steps
constexpr i32 COLUMNS = PANEL * STEP;
constexpr i32 OPERANDS = QUAD_COLUMNS / 8;  // 128-bit words of x a lane needs for a step: two operands each
constexpr u32 X_BYTES = PANEL * 2 * OPERANDS * 512;
// Halves of x's sums over each quadpair's columns, or with whole_steps over a step's.
constexpr u32 SUM_BYTES = PANEL * 2 * 2 * 128;
constexpr float ZERO_CODE = BITS == 4 ? 1024.0f : 1152.0f;  // what the exponent trick adds

// What a block computes: 16 rows of x, some of W, and a range of panels.
struct Tile {
    i32 first_row, operands;  // of x, in operands of 8 rows
    i32 first_n;
    i32 begin, end;  // panels
};
template <i32 ROWS_OF_W>
VOLTA_DEVICE Tile block_tile(const LinearParams& p) {
    const i32 row_tiles = (p.rows + 15) / 16;
    const i32 first_row = static_cast<i32>(block_x()) % row_tiles * 16;
    const i32 panels = (p.w.in + COLUMNS - 1) / COLUMNS;
    const i32 share = (panels + p.splits - 1) / p.splits;
    const i32 begin = static_cast<i32>(block_y()) * share;
    return {first_row, p.rows - first_row > 8 ? 2 : 1, static_cast<i32>(block_x()) / row_tiles * ROWS_OF_W,
            begin, begin + share < panels ? begin + share : panels};
}

// A lane's row of codes, of the 8 from `first`: in the last block some lanes repeat the last row.
VOLTA_DEVICE const u8* lane_codes(const LinearParams& p, i32 first) {
    const i32 n = first + static_cast<i32>(operand_row(lane_index()));
    return p.w.codes + (n < p.w.out ? n : p.w.out - 1) * p.w.codes_row;
}

// Columns c..c+7 of a row of x, those behind the last 0.
VOLTA_DEVICE Word4 load_x(const LinearParams& p, i32 row, i32 c) {
    if (row >= p.rows || c >= p.w.in) return {0, 0, 0, 0};
    const u16* const x = p.x + row * p.x_row + c;
    if (p.wide) return ldg(reinterpret_cast<const Word4*>(x));
    u32 h[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) h[i] = c + i < p.w.in ? ldg(x + i) : 0;
    return {h[0] | h[1] << 16, h[2] | h[3] << 16, h[4] | h[5] << 16, h[6] | h[7] << 16};
}

VOLTA_DEVICE float sum_halves(Word4 w) {
    return low_half(w.x) + high_half(w.x) + low_half(w.y) + high_half(w.y) + low_half(w.z) + high_half(w.z) +
           low_half(w.w) + high_half(w.w);
}

// A panel's x on its way to shared memory: all of it is asked for before any of it is stored. A warp has a unit
// of 8 columns of each quadpair (of 4 bits: two such) and 8 rows of x, or two: halves of operands, for one step.
struct PanelX {
    Word4 low[2], high[2];
};
struct Unit {
    u32 part, m, step;
};
VOLTA_DEVICE Unit panel_unit(const Tile& tile, int u) {
    const u32 unit = warp_index() + static_cast<u32>(u) * 8;
    return {unit & 1, unit >> 1 & static_cast<u32>(tile.operands - 1), unit >> tile.operands};
}
VOLTA_DEVICE PanelX load_panel(const LinearParams& p, const Tile& tile, i32 panel) {
    PanelX x = {};
#pragma unroll
    for (int u = 0; u < 2; ++u) {
        if (u >= tile.operands) continue;
        const Unit at = panel_unit(tile, u);
        const i32 row = tile.first_row + static_cast<i32>(at.m * 8 + operand_row(lane_index()));
        const i32 c = panel * COLUMNS + static_cast<i32>(at.step) * STEP +
                      static_cast<i32>(quadpair(lane_index())) * QUAD_COLUMNS + static_cast<i32>(at.part) * 8;
        x.low[u] = load_x(p, row, c);
        if (BITS == 4) x.high[u] = load_x(p, row, c + 16);
    }
    return x;
}

// x of a panel as row operands, 8 rows each, in the order in which lanes read them: free of conflicts. Behind
// them, with SUMS, its sums over the columns of each quadpair, or with p.whole_steps of all four, in two parts;
// rows r and r + 2 are neighbours.
template <bool SUMS>
VOLTA_DEVICE void store_x(const LinearParams& p, u32 base, const Tile& tile, const PanelX& x) {
    const u32 lane = lane_index();
    const u32 neighbour = (lane & 28) + (lane & 1) * 2 + (lane >> 1 & 1);
#pragma unroll
    for (int u = 0; u < 2; ++u) {
        if (u >= tile.operands) continue;
        const Unit at = panel_unit(tile, u);
        const u32 to = base + (at.step * 2 + at.m) * OPERANDS * 512 + lane * 16;
        const Word4 low = x.low[u];
        float sum = sum_halves(low);
#if BITS == 4
        const Word4 high = x.high[u];
        sum += sum_halves(high);
        sts128(to + at.part * 1024,
               {byte_permute(low.x, low.y, 0x5410), byte_permute(low.x, low.y, 0x7632),
                byte_permute(high.x, high.y, 0x5410), byte_permute(high.x, high.y, 0x7632)});
        sts128(to + at.part * 1024 + 512,
               {byte_permute(low.z, low.w, 0x5410), byte_permute(low.z, low.w, 0x7632),
                byte_permute(high.z, high.w, 0x5410), byte_permute(high.z, high.w, 0x7632)});
#else
        sts128(to + at.part * 512, low);
#endif
        if (SUMS && p.whole_steps) {
            sum += shuffle_xor(sum, 4);
            sum += shuffle_xor(sum, 8);
        }
        if (SUMS)
            sts32(base + X_BYTES + ((at.step * 2 + at.m) * 2 + at.part) * 128 + neighbour * 4, float_bits(sum));
    }
}

// The scale of a group, and its minimum less what the exponent trick adds.
VOLTA_DEVICE Grid coded_grid(const WeightParams& w, i32 n, i32 group) {
    const Grid grid = group_grid(w, n < w.out ? n : w.out - 1, group);
    return {grid.scale, grid.min - ZERO_CODE * grid.scale};
}

// 16 bytes of codes, or none.
VOLTA_DEVICE Word4 load_codes(const u8* at, bool inside) {
    Word4 codes{0, 0, 0, 0};
    if (inside) codes = ldg128_stream(at);
    return codes;
}

// A word of codes as column operands, two of nibbles or one of bytes, each value ZERO_CODE too large.
VOLTA_DEVICE void column_operands(Word2 (&b)[2], u32 codes) {
#if BITS == 4
    constexpr u32 MASKED_OR = 0xea;  // a & b | c
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        b[i] = {lop3<MASKED_OR>(codes >> (4 * i), 0x000f000f, 0x64006400),
                lop3<MASKED_OR>(codes >> (4 * i + 8), 0x000f000f, 0x64006400)};
    }
#else
    const u32 shifted = codes ^ 0x80808080;  // q + 128
    b[0] = b[1] = {byte_permute(shifted, 0x64646464, 0x4140), byte_permute(shifted, 0x64646464, 0x4342)};
#endif
}

// Adds the quadpairs' sums of a warp's 8 rows of W and writes them; each quadpair writes one pair of them.
VOLTA_DEVICE void write_sums(const LinearParams& p, const Tile& tile, i32 first_n, float (&sums)[2][8]) {
    const u32 lane = lane_index();
    const u32 mine = quadpair(lane);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        if (m == tile.operands) continue;
        float pair[2] = {};
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            sums[m][i] += shuffle_xor(sums[m][i], 4);
            sums[m][i] += shuffle_xor(sums[m][i], 8);
            if (i / 2 == mine) pair[i % 2] = sums[m][i];
        }
        const i32 row = tile.first_row + m * 8 + static_cast<i32>(accumulator_row(lane, mine & 1));
        if (row >= p.rows) continue;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const i32 n = first_n + static_cast<i32>(accumulator_column(lane, mine * 2 + i));
            if (n >= p.w.out) continue;
            const i64 to = static_cast<i64>(row) * p.w.out + n;
            if (p.splits > 1) {
                stg(p.partial + block_y() * static_cast<i64>(p.rows) * p.w.out + to, pair[i]);
            } else {
                stg(p.out + to, to_half(pair[i] + bias(p.bias, p.bias_is_float, n)));
            }
        }
    }
}

}  // namespace volta

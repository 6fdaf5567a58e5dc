// x W^T for up to 16 rows of x at a time and a grouped low-bit W: one pass over W, bound by its bytes.
//
// A warp has 8 rows of W, the column operand of m8n8k4; x is the row operand. Quadpair q takes every fourth
// 16 bytes of codes, so that a load covers 64 contiguous bytes of each row, and its own sums over them; the
// quadpairs' sums meet at the end. Integers become halves by the exponent trick (Kim et al., "Who Says
// Elephants Can't Run", 2022): OR-ing q into the mantissa of 1024 gives 1024 + q. Nothing is subtracted or
// scaled there: the 16 bytes share a group, and with z = 1024 (1152 for signed codes)
//     sum x (scale q + min) = scale sum x (q + z) + (min - z scale) sum x,
// in float32, once for every 16 bytes. The nibbles that share a word of the result are columns 0, 2 and 1, 3
// of four, so x waits in shared memory in that order.
//
// A block has 64 rows of W. It walks over panels of PANEL steps of columns: x's operands and sums and the
// panel's scales go to shared memory, while every warp keeps a panel of its codes in flight.
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
};

constexpr i32 QUAD_COLUMNS = 128 / BITS;  // of the 16 bytes that a lane loads
constexpr i32 STEP = 4 * QUAD_COLUMNS;
constexpr i32 PANEL = 4;  // steps
constexpr i32 COLUMNS = PANEL * STEP;
constexpr i32 OPERANDS = QUAD_COLUMNS / 8;  // 128-bit words of x a lane needs for a step: two operands each
// Entries of a group lie 8 banks behind those of the one before: four quadpairs that read four groups of the
// same rows meet no bank twice.
constexpr u32 GROUP_PITCH = (64 + 4) * 8;
constexpr u32 X_BYTES = PANEL * 2 * OPERANDS * 512;
constexpr u32 SUM_BYTES = PANEL * 2 * 2 * 128;              // halves of x's sums over each quadpair's columns
constexpr float ZERO_CODE = BITS == 4 ? 1024.0f : 1152.0f;  // what the exponent trick adds

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

// x of a panel as row operands, 8 rows each, in the order in which lanes read them: free of conflicts. Behind
// them its sums over the columns of each quadpair, in two parts; rows r and r + 2 are neighbours.
VOLTA_DEVICE void store_x(const LinearParams& p, u32 base, i32 first_row, i32 operands, i32 panel) {
    const u32 lane = lane_index();
    const u32 neighbour = (lane & 28) + (lane & 1) * 2 + (lane >> 1 & 1);
    for (u32 unit = warp_index(); unit < static_cast<u32>(PANEL * 2 * operands); unit += 8) {
        const u32 part = unit % 2;
        const u32 m = unit / 2 % operands;
        const u32 step = unit / 2 / operands;
        const i32 row = first_row + static_cast<i32>(m * 8 + operand_row(lane));
        const i32 quad =
            panel * COLUMNS + static_cast<i32>(step) * STEP + static_cast<i32>(quadpair(lane)) * QUAD_COLUMNS;
        const u32 to = base + (step * 2 + m) * OPERANDS * 512 + lane * 16;
        const Word4 low = load_x(p, row, quad + static_cast<i32>(part) * 8);
        float sum = sum_halves(low);
#if BITS == 4
        const Word4 high = load_x(p, row, quad + 16 + static_cast<i32>(part) * 8);
        sum += sum_halves(high);
        sts128(to + part * 1024,
               {byte_permute(low.x, low.y, 0x5410), byte_permute(low.x, low.y, 0x7632),
                byte_permute(high.x, high.y, 0x5410), byte_permute(high.x, high.y, 0x7632)});
        sts128(to + part * 1024 + 512,
               {byte_permute(low.z, low.w, 0x5410), byte_permute(low.z, low.w, 0x7632),
                byte_permute(high.z, high.w, 0x5410), byte_permute(high.z, high.w, 0x7632)});
#else
        sts128(to + part * 512, low);
#endif
        sts32(base + X_BYTES + ((step * 2 + m) * 2 + part) * 128 + neighbour * 4, float_bits(sum));
    }
}

// Scales of a panel, and minima less what the exponent trick adds.
VOLTA_DEVICE void store_grids(const WeightParams& w, u32 base, i32 first_row, i32 first_group, i32 groups) {
    for (i32 i = static_cast<i32>(thread_index()); i < groups * 64; i += 256) {
        const i32 row = first_row + i % 64;
        const Grid grid = group_grid(w, row < w.out ? row : w.out - 1, first_group + i / 64);
        sts64(base + i / 64 * GROUP_PITCH + i % 64 * 8,
              {float_bits(grid.scale), float_bits(grid.min - ZERO_CODE * grid.scale)});
    }
}

// 16 bytes of a row's codes.
VOLTA_DEVICE Word4 load_codes(const WeightParams& w, const u8* row, i32 c) {
    Word4 codes{0, 0, 0, 0};
    if (c < w.in) codes = ldg128_stream(row + c * BITS / 8);
    return codes;
}

// x / group_size, x below group_size + COLUMNS.
VOLTA_DEVICE i32 groups_before(i32 x, u32 inverse) {
    return static_cast<i32>(static_cast<u64>(static_cast<u32>(x)) * inverse >> 32);
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
    const i32 row_tiles = (p.rows + 15) / 16;
    const i32 first_row = static_cast<i32>(block_x()) % row_tiles * 16;
    const i32 first_n = static_cast<i32>(block_x()) / row_tiles * 64;
    const i32 operands = p.rows - first_row > 8 ? 2 : 1;
    const i32 my_n = static_cast<i32>(warp_index() * 8 + operand_row(lane));
    const i32 codes_n = first_n + my_n < p.w.out ? first_n + my_n : p.w.out - 1;
    const u8* const codes_row = p.w.codes + codes_n * p.w.codes_row;
    const u32 grids = shared_base() + X_BYTES + SUM_BYTES;
    // A lane's sums of x in a step, and its entries of a group: see add_scaled.
    const u32 my_x_sums = shared_base() + X_BYTES + ((lane & 28) + (lane & 1) * 2) * 4;
    const u32 my_grids = grids + (warp_index() * 8 + (lane & 2)) * 8;

    const i32 panels = (p.w.in + COLUMNS - 1) / COLUMNS;
    const i32 share = (panels + p.splits - 1) / p.splits;
    const i32 begin = static_cast<i32>(block_y()) * share;
    const i32 end = begin + share < panels ? begin + share : panels;
    const i32 my_quad = static_cast<i32>(quadpair(lane)) * QUAD_COLUMNS;

    float sums[2][8] = {};
    Word4 codes[PANEL];
#pragma unroll
    for (int t = 0; t < PANEL; ++t)
        codes[t] = load_codes(p.w, codes_row, begin * COLUMNS + t * STEP + my_quad);
#pragma unroll 1
    for (i32 panel = begin; panel < end; ++panel) {
        const i32 first = panel * COLUMNS;
        const i32 last = first + COLUMNS < p.w.in ? first + COLUMNS - 1 : p.w.in - 1;
        const i32 first_group = (first + p.w.group_offset) / p.w.group_size;
        const i32 inside = first + p.w.group_offset - first_group * p.w.group_size;  // of the first group
        store_x(p, shared_base(), first_row, operands, panel);
        store_grids(p.w, grids, first_n, first_group,
                    groups_before(last - first + inside, p.group_inverse) + 1);
        barrier();
#pragma unroll
        for (int t = 0; t < PANEL; ++t) {
            const i32 c = first + t * STEP + my_quad;
            const i32 group = groups_before((c < p.w.in ? c : last) - first + inside, p.group_inverse);
            const u32 grid = my_grids + static_cast<u32>(group) * GROUP_PITCH;
            const Word4 scaling[2] = {lds128(grid), lds128(grid + 32)};
            const u32 words[4] = {codes[t].x, codes[t].y, codes[t].z, codes[t].w};
            codes[t] = load_codes(p.w, codes_row, panel + 1 < end ? c + COLUMNS : p.w.in);
            Word2 b[4][2];
#pragma unroll
            for (int j = 0; j < 4; ++j) column_operands(b[j], words[j]);
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                if (m == operands) continue;
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

    // Each quadpair writes one pair of columns.
    const u32 mine = quadpair(lane);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        if (m == operands) continue;
        float pair[2] = {};
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            sums[m][i] += shuffle_xor(sums[m][i], 4);
            sums[m][i] += shuffle_xor(sums[m][i], 8);
            if (i / 2 == mine) pair[i % 2] = sums[m][i];
        }
        const i32 row = first_row + m * 8 + static_cast<i32>(accumulator_row(lane, mine & 1));
        if (row >= p.rows) continue;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const i32 n =
                first_n + static_cast<i32>(warp_index() * 8 + accumulator_column(lane, mine * 2 + i));
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

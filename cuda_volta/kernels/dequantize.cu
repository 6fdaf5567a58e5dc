// Rows of a grouped weight as halves: embedding rows, and matrices on their way to a dense product.
#include "rows.cuh"
#include "weight.cuh"

namespace volta {

struct DequantizeParams {
    WeightParams w;
    const i64* ids;     // row of W for each row of out, clamped; null: first_row + the row
    const i32* x_perm;  // column c of W goes to column x_perm[c * perm_stride]; null: to c
    u16* out;           // (rows, in), dense
    i64 first_row;
    i32 perm_stride, wide;
};

// The integers of columns c..c+7, c a multiple of 8.
VOLTA_DEVICE Octet load_codes(const WeightParams& w, const u8* row, i32 c) {
    Octet q;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#if BITS == 4
        const u32 byte = ldg(row + c / 32 * 16 + c % 16 + i);
        q.x[i] = static_cast<float>(c % 32 < 16 ? byte & 15 : byte >> 4);
#else
        q.x[i] = c + i < w.in ? static_cast<float>(static_cast<signed char>(ldg(row + c + i))) : 0.0f;
#endif
    }
    return q;
}

}  // namespace volta

using namespace volta;

// Grid: (rows, in / 8 / threads); a thread has 8 columns.
VOLTA_KERNEL(dequantize, 256, 4)(DequantizeParams p) {
    const i64 place = block_x();
    const i32 c = static_cast<i32>(block_y() * 256 + thread_index()) * 8;
    if (c >= p.w.in) return;
    i64 row = p.ids ? ldg(p.ids + place) : p.first_row + place;
    row = row < 0 ? 0 : row < p.w.out ? row : p.w.out - 1;

    Octet x = load_codes(p.w, p.w.codes + row * p.w.codes_row, c);
    i32 group = -1;
    Grid grid{0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (c + i >= p.w.in) continue;
        const i32 g = column_group(p.w, c + i);
        if (g != group) grid = group_grid(p.w, row, g);
        group = g;
        x.x[i] = grid.scale * x.x[i] + grid.min;
    }
    u16* const out = p.out + place * p.w.in;
    if (!p.x_perm) {
        store_octet(out + c, p.w.in - c, p.wide, x);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (c + i >= p.w.in) continue;
        const i32 to = ldg(p.x_perm + static_cast<i64>(c + i) * p.perm_stride);
        if (to >= 0 && to < p.w.in) stg(out + to, to_half(x.x[i]));
    }
}

// x W^T for up to 16 rows of x at a time and a low-bit W whose columns belong to groups in any way: by g_idx,
// as a rank's piece of an act-order matrix, or in groups that are no whole number of 16-byte chunks.
//
// Each code is scaled by itself and rounded to a half, as a dequantized matrix would be, and goes into the
// tensor cores from registers. A panel's x, the group of each of its columns and the scales of MOST_GROUPS
// groups go to shared memory: enough for columns that are sorted by group, which pieces of an act-order matrix
// are. Groups beyond are read where they lie, once a column.
#include "linear.cuh"

namespace volta {

constexpr i32 MOST_GROUPS = 40;
constexpr i32 BLOCK_N = 64;  // rows of W, 8 a warp
constexpr u32 GROUP_PITCH = (BLOCK_N + 4) * 8;
// Of the columns' places: two quadpairs' in a phase of a 128-bit load meet no bank twice.
constexpr u32 QUAD_PITCH = QUAD_COLUMNS * 4 + (BITS == 4 ? 16 : 0);
constexpr u32 PLACES_BYTES = 4 * PANEL * QUAD_PITCH;
constexpr u32 FAR = 0x80000000;  // with a column's group: it is not in shared memory

// Groups that are in shared memory.
struct Staged {
    i32 first, count;
};
VOLTA_DEVICE Staged staged_groups(const WeightParams& w, i32 first_column, i32 last_column) {
    if (w.groups <= MOST_GROUPS) return {0, w.groups};
    const i32 first = column_group(w, first_column);
    const i32 count = column_group(w, last_column) - first + 1;
    return {first, count < 1 ? 1 : count < MOST_GROUPS ? count : MOST_GROUPS};
}

// Where the scales of each column of a panel are, a word a column; behind them for each warp, whose columns are
// half a step, whether any of its columns is FAR. Columns behind the last one count as the last.
VOLTA_DEVICE void store_places(const WeightParams& w, u32 base, const Staged& staged, i32 first, i32 last) {
    constexpr i32 EACH = COLUMNS / 256;
    const i32 mine = static_cast<i32>(thread_index()) * EACH;
    u32 places[EACH];
    bool far = false;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const i32 c = first + mine + i;
        const i32 group = column_group(w, c < last ? c : last);
        const bool inside = group >= staged.first && group < staged.first + staged.count;
        places[i] =
            inside ? static_cast<u32>(group - staged.first) * GROUP_PITCH : FAR | static_cast<u32>(group);
        far |= !inside;
    }
    const u32 to =
        base + static_cast<u32>(mine / QUAD_COLUMNS) * QUAD_PITCH + static_cast<u32>(mine % QUAD_COLUMNS) * 4;
    if (EACH == 2)
        sts64(to, {places[0], places[EACH - 1]});
    else
        sts32(to, places[0]);
    const bool any = any_lane(far);
    if (lane_index() == 0) sts32(base + PLACES_BYTES + warp_index() * 4, any);
}

// Their scales and minima, those of a row of W beside each other. Neighbouring lanes have neighbouring groups,
// which share a sector of memory.
VOLTA_DEVICE void store_grids(const WeightParams& w, u32 base, i32 first_n, const Staged& staged) {
    const u32 n = thread_index() >> 2;
    for (u32 g = thread_index() & 3; g < static_cast<u32>(staged.count); g += 4) {
        const Grid grid =
            coded_grid(w, first_n + static_cast<i32>(n), staged.first + static_cast<i32>(g));
        sts64(base + g * GROUP_PITCH + n * 8, {float_bits(grid.scale), float_bits(grid.min)});
    }
}

// What a lane knows while it scales a step's codes.
struct Scales {
    const WeightParams* w;
    u32 grids;  // of its row of W, in shared memory
    i32 n;
};
template <bool ANY_FAR>
VOLTA_DEVICE Grid grid_at(const Scales& s, u32 place) {
    if (ANY_FAR && place & FAR) return coded_grid(*s.w, s.n, static_cast<i32>(place & ~FAR));
    const Word2 grid = lds64(s.grids + place);
    return {bits_float(grid.x), bits_float(grid.y)};
}
template <bool ANY_FAR>
VOLTA_DEVICE u32 scaled(const Scales& s, u32 codes, u32 low_place, u32 high_place) {
    const Grid low = grid_at<ANY_FAR>(s, low_place);
    const Grid high = grid_at<ANY_FAR>(s, high_place);
    return pack_half2(low.scale * low_half(codes) + low.min, high.scale * high_half(codes) + high.min);
}

// One step: 16 bytes of codes of each lane, whose columns' places begin at `places`.
template <bool ANY_FAR>
VOLTA_DEVICE void add_step(float (&sums)[2][8], const Scales& scales, Word4 codes, u32 places, u32 x,
                           i32 operands) {
    const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int j = 0; j < OPERANDS; ++j) {
        Word2 b[2];
#if BITS == 4
        column_operands(b, words[j]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Word4 at = lds128(places + (16 * i + 4 * j) * 4);
            b[i] = {scaled<ANY_FAR>(scales, b[i].x, at.x, at.z), scaled<ANY_FAR>(scales, b[i].y, at.y, at.w)};
        }
#else
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            Word2 coded[2];
            column_operands(coded, words[2 * j + i]);
            const Word4 at = lds128(places + (8 * j + 4 * i) * 4);
            b[i] = {scaled<ANY_FAR>(scales, coded[0].x, at.x, at.y),
                    scaled<ANY_FAR>(scales, coded[0].y, at.z, at.w)};
        }
#endif
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            if (m == operands) continue;
            const Word4 a = lds128(x + (m * OPERANDS + j) * 512);
            mma_rc(sums[m], {a.x, a.y}, b[0]);
            mma_rc(sums[m], {a.z, a.w}, b[1]);
        }
    }
}

}  // namespace volta

using namespace volta;

// Grid: (row tiles * ceil(out / 64), splits); the row tiles of the same weights are neighbours.
VOLTA_KERNEL(linear_any_groups, 256, 2)(LinearParams p) {
    const u32 lane = lane_index();
    const Tile tile = block_tile<BLOCK_N>(p);
    const i32 first_n = tile.first_n + static_cast<i32>(warp_index()) * 8;
    const u8* const codes_row = lane_codes(p, first_n);
    const u32 places = shared_base() + X_BYTES;
    const u32 far = places + PLACES_BYTES;
    const u32 grids = far + 8 * 4;
    const u32 my_row = warp_index() * 8 + operand_row(lane);
    const u32 my_places = places + quadpair(lane) * QUAD_PITCH;
    const Scales scales{&p.w, grids + my_row * 8, tile.first_n + static_cast<i32>(my_row)};
    const i32 my_quad = static_cast<i32>(quadpair(lane)) * QUAD_COLUMNS;

    float sums[2][8] = {};
    const i32 end = tile.end * COLUMNS < p.w.in ? tile.end * COLUMNS : p.w.in;
    i32 column = tile.begin * COLUMNS + my_quad;  // of the codes in flight
    Word4 next = load_codes(codes_row + static_cast<i64>(column) * BITS / 8, column < end);
#pragma unroll 1
    for (i32 panel = tile.begin; panel < tile.end; ++panel) {
        const i32 first = panel * COLUMNS;
        const i32 last = first + COLUMNS < p.w.in ? first + COLUMNS - 1 : p.w.in - 1;
        const Staged staged = staged_groups(p.w, first, last);
        store_x<false>(p, shared_base(), tile, load_panel(p, tile, panel));
        store_places(p.w, places, staged, first, last);
        store_grids(p.w, grids, tile.first_n, staged);
        barrier();
        // Not unrolled: four copies would not fit the instruction cache near a sub-core.
#pragma unroll 1
        for (i32 t = 0; t < PANEL; ++t) {
            const Word4 codes = next;
            column += STEP;
            next = load_codes(codes_row + static_cast<i64>(column) * BITS / 8, column < end);
            const u32 at = my_places + static_cast<u32>(t) * 4 * QUAD_PITCH;
            const u32 x = shared_base() + static_cast<u32>(t) * 2 * OPERANDS * 512 + lane * 16;
            const Word2 any_far = lds64(far + static_cast<u32>(t) * 8);
            if (any_far.x | any_far.y)
                add_step<true>(sums, scales, codes, at, x, tile.operands);
            else
                add_step<false>(sums, scales, codes, at, x, tile.operands);
        }
        barrier();
    }
    write_sums(p, tile, first_n, sums);
}

// y = x W^T + bias for many rows of x, W dense or quantized.
//
// x is packed, up to GEMM_COLUMNS rows of it at a time. A thread takes GEMM_ROWS rows of W, and walks along
// the summed dimension in blocks of at most DEPTH units: it decodes TILE_ROWS rows into a buffer that stays
// in L1, and multiplies them with all of x's block, which stays in L2. The sums, [row of W][row of x], are
// transposed into the result at the end.
#pragma once

#include "integers.hpp"
#include "ops_gemm_decode.hpp"
#include "ops_linear.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int64_t GEMM_COLUMNS = 512;  // rows of x packed at a time
constexpr int64_t GEMM_ROWS = 48;      // rows of W that a thread takes at a time
static_assert(GEMM_ROWS % TILE_ROWS == 0 && GEMM_ROWS % W == 0, "whole tiles, and whole vectors of results");

// How the summed dimension is cut, and the workspace: packed x, the group index, then for each thread the
// scales of GEMM_ROWS rows, the decoded rows of a tile, and sums.
struct GemmLayout {
    int64_t units, depth;                    // in all, in a block
    int64_t columns;                         // of sums: rows of x
    size_t x, index, scales, decoded, sums;  // bytes
    size_t of_thread() const { return scales + decoded + sums; }
    size_t total(int threads) const { return x + index + size_t(threads) * of_thread(); }
};
static GemmLayout gemm_layout(const LinearArgs& a, int step) {
    GemmLayout l;
    const int64_t chunk = CHUNK / step;
    l.units = chunks_of(a.w.in) * chunk;
    const int64_t blocks = imax(1, ceil_div(l.units, DEPTH));
    l.depth = round_up(ceil_div(l.units, blocks), chunk);
    l.columns = round_up(imin(a.rows, GEMM_COLUMNS), W);
    l.x = aligned(size_t(l.columns * l.units) * 4);
    l.index = a.w.kind == WeightKind::dense ? 0 : aligned(size_t(index_length(a.w)) * sizeof(int32_t));
    l.scales = aligned(size_t(GEMM_ROWS * scale_floats(a.w)) * sizeof(float));
    l.decoded = aligned(size_t(TILE_ROWS * DECODED_STRIDE) * 4);
    l.sums = aligned(size_t(GEMM_ROWS * l.columns) * sizeof(float));
    return l;
}

template <class Units, class T>
struct Gemm {
    using Unit = typename Units::Unit;
    const LinearArgs& a;
    const GemmLayout& l;
    Unit* x;  // [block][panel][unit][W]
    const int32_t* index;
    DecodePart<Units> decode;
    int64_t first, rows;  // of x, packed now

    int64_t panels() const { return (rows + W - 1) / W; }
    // Calls body(k, depth) for each block of the summed dimension; once where it is empty.
    template <class Body>
    FA_INLINE_MEMBER void blocks(const Body& body) const {
        int64_t k = 0;
        do {
            body(k, l.units - k < l.depth ? l.units - k : l.depth);
            k += l.depth;
        } while (k < l.units);
    }

    void pack(int64_t panel) const {
        const T* from = static_cast<const T*>(a.x) + (first + panel * W) * a.x_stride;
        const int64_t n = rows - panel * W < W ? rows - panel * W : W;
        blocks([&](int64_t k, int64_t depth) {
            Unit* to = x + (k * panels() + panel * depth) * W;
            for (int64_t end = k + depth; k < end; k += W, to += W * W) {
                vf block[W];
                const T* row = from + k * Units::STEP;
                for (int i = 0; i < W; i++, row += a.x_stride)
                    block[i] = i < n ? Units::load_row(row, a.w.in - k * Units::STEP) : zero();
                transpose(block);
                for (int i = 0; i < W; i++) store(reinterpret_cast<float*>(to + i * W), block[i]);
            }
        });
    }

    // Rows [lo, hi) of W.
    void multiply(int64_t lo, int64_t hi, char* scratch) const {
        float* scales = reinterpret_cast<float*>(scratch);
        Unit* decoded = reinterpret_cast<Unit*>(scratch + l.scales);
        float* sums = reinterpret_cast<float*>(scratch + l.scales + l.decoded);
        const int64_t n = hi - lo, columns = panels() * W, chunk = CHUNK / Units::STEP;
        Row opened[GEMM_ROWS];
        for (int64_t o = 0; o < n; o++) opened[o] = open_row(a.w, lo + o, scales + o * scale_floats(a.w));
        blocks([&](int64_t k, int64_t depth) {
            for (int64_t o = 0; o < n; o += TILE_ROWS) {
                Part part = {opened + o, n - o, k / chunk, (k + depth) / chunk, -o, depth / chunk};
                if (part.n > TILE_ROWS) part.n = part.next_rows = TILE_ROWS, part.next_chunks = 0;
                decode(a.w, part, index, decoded);
                gemm_tiles<Units>(decoded, x + k * columns, rows, depth, k > 0, sums + o * columns, columns);
            }
        });
        for (int64_t o = 0; o < n; o += W) finish(lo + o, n - o < W ? n - o : W, sums + o * columns);
    }

    // Adds the bias to columns [o, o + n) of the result, n <= W, and writes them.
    void finish(int64_t o, int64_t n, const float* sums) const {
        const int64_t columns = panels() * W;
        float added[W] = {};
        if (a.bias)
            for (int64_t i = 0; i < n; i++) added[i] = scalar_of(a.bias, a.bias_dtype, o + i);
        const vf bias = load(added);
        for (int64_t m = 0; m < rows; m += W) {
            vf block[W];
            for (int i = 0; i < W; i++) block[i] = load(sums + i * columns + m);
            transpose(block);
            T* out = static_cast<T*>(a.out) + (first + m) * a.w.out + o;
            const int64_t count = rows - m < W ? rows - m : W;
            for (int64_t i = 0; i < count; i++, out += a.w.out) {
                const vf y = block[i] + bias;
                if (n == W)
                    store(out, y);
                else
                    store_n(out, y, int(n));
            }
        }
    }
};

template <class Units, class T>
static void run_gemm(const LinearArgs& a, int threads, char* workspace) {
    using Unit = typename Units::Unit;
    const GemmLayout l = gemm_layout(a, Units::STEP);
    int32_t* index = reinterpret_cast<int32_t*>(workspace + l.x);
    if (l.index) fill_index(a.w, index);
    DecodePart<Units> decode;
    with_format(a.w, ChooseDecoder<Units>{&decode});
    char* own = workspace + l.x + l.index;
    for (int64_t first = 0; first < a.rows; first += GEMM_COLUMNS) {
        const int64_t rows = a.rows - first < GEMM_COLUMNS ? a.rows - first : GEMM_COLUMNS;
        const Gemm<Units, T> g = {a, l, reinterpret_cast<Unit*>(workspace), index, decode, first, rows};
        parallel_for(g.panels(), threads, [&](int64_t panel, int) { g.pack(panel); });
        parallel_for((a.w.out + GEMM_ROWS - 1) / GEMM_ROWS, threads, [&](int64_t item, int thread) {
            const int64_t lo = item * GEMM_ROWS, hi = lo + GEMM_ROWS < a.w.out ? lo + GEMM_ROWS : a.w.out;
            g.multiply(lo, hi, own + size_t(thread) * l.of_thread());
        });
    }
}

#if defined(__AVX512BF16__)
using UnitsOfBf16 = GemmBf16;
#else
using UnitsOfBf16 = GemmFloat;
#endif

static size_t gemm_workspace(const LinearArgs& a, int threads) {
    return gemm_layout(a, a.dtype == DType::bf16 ? UnitsOfBf16::STEP : 1).total(threads);
}

static void gemm(const LinearArgs& a, int threads, void* workspace) {
    char* memory = static_cast<char*>(workspace);
    if (a.dtype == DType::f32) return run_gemm<GemmFloat, float>(a, threads, memory);
    if (a.dtype == DType::f16) return run_gemm<GemmFloat, f16>(a, threads, memory);
    run_gemm<UnitsOfBf16, bf16>(a, threads, memory);
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

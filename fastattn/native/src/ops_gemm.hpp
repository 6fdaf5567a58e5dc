// y = x W^T + bias for many rows of x, W dense or quantized.
//
// x is packed once, up to GEMM_COLUMNS rows of it at a time. A thread takes a block of W's rows, and walks
// along the summed dimension in blocks of DEPTH units: it decodes TILE_ROWS rows into a buffer that stays in
// L1, and multiplies them with all of x's block, which stays in L2. The sums, [row of W][row of x], are
// transposed into the result at the end.
#pragma once

#include "ops_gemm_tile.hpp"
#include "ops_linear.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int64_t GEMM_COLUMNS = 512;  // rows of x packed at a time
constexpr int64_t GEMM_ROWS = 48;      // rows of W that a thread takes at a time
static_assert(GEMM_ROWS % TILE_ROWS == 0 && GEMM_ROWS % W == 0, "whole tiles, and whole vectors of the result");

FA_INLINE int64_t round_to(int64_t n, int64_t grain) { return (n + grain - 1) / grain * grain; }

// Workspace: packed x, the group index, then for each thread the scales of a block of rows, decoded rows of
// a tile, and sums.
struct GemmLayout {
    int64_t columns;  // of sums: rows of x
    size_t x, index, scales, decoded, sums;  // bytes
    size_t of_thread() const { return scales + decoded + sums; }
    size_t total(int threads) const { return x + index + size_t(threads) * of_thread(); }
};
static GemmLayout gemm_layout(const LinearArgs& a, int step) {
    GemmLayout l;
    l.columns = round_to(a.rows < GEMM_COLUMNS ? a.rows : GEMM_COLUMNS, W);
    l.x = aligned(size_t(l.columns * (chunks_of(a.w.in) * CHUNK / step)) * 4);
    l.index = a.w.kind == WeightKind::dense ? 0 : aligned(size_t(index_length(a.w)) * sizeof(int32_t));
    l.scales = aligned(size_t(GEMM_ROWS * scale_floats(a.w)) * sizeof(float));
    l.decoded = aligned(size_t(TILE_ROWS * DECODED_STRIDE) * 4);
    l.sums = aligned(size_t(GEMM_ROWS * l.columns) * sizeof(float));
    return l;
}

// Chunks [lo, hi) of `n` <= TILE_ROWS rows into `to`; rows that W does not have become zeros.
template <class Units>
using DecodeRows = void (*)(const WeightArgs&, const Row* rows, int64_t n, const int32_t* index, int64_t lo,
                            int64_t hi, typename Units::Unit* to);

template <class Format, class Units>
static void decode_rows(const WeightArgs& weight, const Row* rows, int64_t n, const int32_t* index,
                        int64_t lo, int64_t hi, typename Units::Unit* to) {
    constexpr int64_t UNITS = CHUNK / Units::STEP;
    const int64_t whole = hi * CHUNK <= weight.in ? hi : weight.in / CHUNK;
    const int64_t next_tile = TILE_ROWS * weight.code_stride * code_bytes(weight);
    for (int64_t r = 0; r < TILE_ROWS; r++, to += DECODED_STRIDE) {
        if (r >= n) {
            memset(to, 0, size_t((hi - lo) * UNITS) * 4);
            continue;
        }
        vf w[PARTS];
        for (int64_t c = lo; c < whole; c++) {
            const uint8_t* codes = rows[r].codes + c * Format::BYTES;
            // A row is read a few lines at a time: too short a stream for the processor to foresee.
            __builtin_prefetch(codes + next_tile);
            Format::decode(codes, rows[r], index, c, w);
            Units::store_chunk(to + (c - lo) * UNITS, w);
        }
        if (whole < hi) {
            alignas(64) uint8_t buffer[Format::BYTES];
            Format::decode(chunk_codes<Format>(rows[r], whole, weight.in, buffer), rows[r], index, whole, w);
            Units::store_chunk(to + (whole - lo) * UNITS, w);
        }
    }
}

template <class Units>
struct ChooseDecoder {
    DecodeRows<Units>* chosen;
    template <class Format>
    void run() const {
        *chosen = decode_rows<Format, Units>;
    }
};

template <class Units, class T>
struct Gemm {
    using Unit = typename Units::Unit;
    const LinearArgs& a;
    const GemmLayout& l;
    Unit* x;  // [block of DEPTH units][panel][unit][W]
    const int32_t* index;
    DecodeRows<Units> decode;
    int64_t first, rows;  // of x, packed now

    int64_t panels() const { return (rows + W - 1) / W; }
    int64_t units() const { return chunks_of(a.w.in) * CHUNK / Units::STEP; }

    void pack(int64_t panel) const {
        const T* from = static_cast<const T*>(a.x) + (first + panel * W) * a.x_stride;
        const int64_t n = rows - panel * W < W ? rows - panel * W : W;
        for (int64_t k0 = 0; k0 < units(); k0 += DEPTH) {
            const int64_t depth = units() - k0 < DEPTH ? units() - k0 : DEPTH;
            Unit* to = x + (k0 * panels() + panel * depth) * W;
            for (int64_t k = k0; k < k0 + depth; k += W) {
                vf block[W];
                for (int i = 0; i < W; i++)
                    block[i] = i < n ? Units::load_row(from + i * a.x_stride + k * Units::STEP,
                                                       a.w.in - k * Units::STEP)
                                     : zero();
                transpose(block);
                for (int i = 0; i < W; i++) store(reinterpret_cast<float*>(to + (k - k0 + i) * W), block[i]);
            }
        }
    }

    // Rows [lo, hi) of W.
    void multiply(int64_t lo, int64_t hi, char* scratch) const {
        float* scales = reinterpret_cast<float*>(scratch);
        Unit* decoded = reinterpret_cast<Unit*>(scratch + l.scales);
        float* sums = reinterpret_cast<float*>(scratch + l.scales + l.decoded);
        const int64_t columns = panels() * W, chunk = CHUNK / Units::STEP;
        Row opened[GEMM_ROWS];
        for (int64_t o = lo; o < hi; o++)
            opened[o - lo] = open_row(a.w, o, scales + (o - lo) * scale_floats(a.w));
        for (int64_t k = 0; k == 0 || k < units(); k += DEPTH) {
            const int64_t depth = units() - k < DEPTH ? units() - k : DEPTH;
            for (int64_t o = 0; o < hi - lo; o += TILE_ROWS) {
                const int64_t n = hi - lo - o < TILE_ROWS ? hi - lo - o : TILE_ROWS;
                decode(a.w, opened + o, n, index, k / chunk, (k + depth) / chunk, decoded);
                const Unit* panel = x + k * columns;
                float* c = sums + o * columns;
                int64_t m = 0;
                for (; m + 2 * W <= columns; m += 2 * W)
                    gemm_tile<Units, 2>(decoded, panel + m * depth, depth * W, depth, k > 0, c + m, columns);
                if (m < columns)
                    gemm_tile<Units, 1>(decoded, panel + m * depth, depth * W, depth, k > 0, c + m, columns);
            }
        }
        for (int64_t o = lo; o < hi; o += W) finish(o, hi - o < W ? hi - o : W, sums + (o - lo) * columns);
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
    const GemmLayout l = gemm_layout(a, Units::STEP);
    int32_t* index = reinterpret_cast<int32_t*>(workspace + l.x);
    if (l.index) fill_index(a.w, index);
    DecodeRows<Units> decode;
    with_format(a.w, ChooseDecoder<Units>{&decode});
    char* own = workspace + l.x + l.index;
    for (int64_t first = 0; first < a.rows; first += GEMM_COLUMNS) {
        const int64_t rows = a.rows - first < GEMM_COLUMNS ? a.rows - first : GEMM_COLUMNS;
        using Unit = typename Units::Unit;
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
    const int step = a.dtype == DType::bf16 ? UnitsOfBf16::STEP : 1;
    return gemm_layout(a, step).total(threads);
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

// The linear layer on integer dot products: memory, threads, and the part of W that is constant in a group.
#pragma once

#include "ops_dot.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// W and x are multiplied in panels of columns: x stays in the first-level cache while the rows of a tile
// pass, and sums of sums err less than one long sum.
constexpr int64_t PANEL_BYTES = 16384, PANEL_PASSES = 64;
// Up to so many values of x, every thread prepares them for itself: sooner than one for all, or all together.
constexpr int64_t PREPARED_ALONE = 1 << 15;

// Whether groups are runs of whole lanes.
template <class Codes>
static bool lanes_aligned(const WeightArgs& w) {
    return grouping(w) == CHUNK_GROUPS || (Codes::OPERANDS == 1 && grouping(w) == HALF_GROUPS);
}

// W = scale * (code - CENTER) + constant, with constant = min + CENTER * scale. The first term is a matter of
// integers; the second is added group by group, times the sum of x over the group.
template <class Codes, int LIMBS, class Scale>
class DotLinear {
    using Record = Limbs<Codes, LIMBS>;
    static constexpr int UNIT = dot_unit<Codes>();

public:
    DotLinear(const LinearArgs& a, int threads, void* workspace)
        : a_(a),
          groups_((a.w.groups + W - 1) / W * W),
          at_(reinterpret_cast<uintptr_t>(workspace)),
          passes_(blocks(), a.w.in, lanes_aligned<Codes>(a.w), at_) {
        uintptr_t p = at_;
        last_ = take<Scale>(p, LAST_ROWS * last_stride());
        const uintptr_t begin = p;
        // One more: a block past the end has no pass, but its x is written.
        const int64_t records = Passes<Codes>::room(blocks(), lanes_aligned<Codes>(a.w)) + 1;
        x_.records = take<Record>(p, records * a.rows);
        x_.sums = take<float>(p, has_constants() ? a.rows * groups_ : 0);
        x_bytes_ = p - begin;
        tile_sums_ = reinterpret_cast<vf*>(begin + x_bytes_ * size_t(prepared_apart() ? threads : 1));
    }

    static size_t workspace(const LinearArgs& a, int threads) {
        const DotLinear d(a, threads, nullptr);
        return reinterpret_cast<uintptr_t>(d.tile_sums_) + size_t(threads * d.thread_sums()) * sizeof(vf);
    }

    // False when floats must do it: x may have values that integers do not cover.
    bool run(int threads) {
        if (a_.rows == 0 || a_.w.out == 0) return true;
        if (a_.w.in == 0 || a_.w.scale_stride == 0) return false;
        if (!passes_.plan(a_.w)) return false;
        if (!prepared_apart() && !prepare_together(threads)) return false;
        copy_last_scales();
        int invalid = 0;
        // Contiguous, so that what a thread fetches ahead is its own.
        parallel_ranges(a_.w.out, TILE, threads, [&](int64_t lo, int64_t hi, int thread) {
            const Stream stream(a_, lo, hi, thread);
            const Input x = input_of(thread);
            if (prepared_apart() && !prepare(x, 0, a_.rows))
                return __atomic_store_n(&invalid, 1, __ATOMIC_RELAXED);  // as every thread finds
            vf* sums = tile_sums_ + thread * thread_sums();
            for (int64_t o = lo; o < hi; o += TILE) {
                (o + TILE < hi ? head_at(a_.w, o + TILE) : stream.next()).fetch_scales();
                tile(x, stream, o, hi - o < TILE ? int(hi - o) : TILE, sums);
            }
        });
        return !invalid;
    }

private:
    int64_t blocks() const { return (a_.w.in + UNIT - 1) / UNIT * (UNIT / Codes::COLUMNS); }
    int64_t thread_sums() const { return a_.rows * TILE; }
    bool has_constants() const { return a_.w.mins || Codes::CENTER; }

    // x as integers, and its sums over groups.
    struct Input {
        Record* records;  // [pass][rows]
        float* sums;      // [rows][groups_]
    };
    bool prepared_apart() const { return a_.rows * a_.w.in <= PREPARED_ALONE; }
    Input input_of(int thread) const {
        const size_t offset = prepared_apart() ? size_t(thread) * x_bytes_ : 0;
        return {reinterpret_cast<Record*>(reinterpret_cast<char*>(x_.records) + offset),
                reinterpret_cast<float*>(reinterpret_cast<char*>(x_.sums) + offset)};
    }

    // Rows [lo, hi) of x; false when a value is none for integers.
    bool prepare(const Input& x, int64_t lo, int64_t hi) const {
        if (a_.dtype == DType::f32) return prepare_rows<float>(x, lo, hi);
        return a_.dtype == DType::f16 ? prepare_rows<f16>(x, lo, hi) : prepare_rows<bf16>(x, lo, hi);
    }
    template <class T>
    bool prepare_rows(const Input& to, int64_t lo, int64_t hi) const {
        bool valid = true;
        for (int64_t m = lo; m < hi; m++) {
            float* sums = has_constants() ? to.sums + m * groups_ : nullptr;
            if (sums) memset(sums, 0, size_t(groups_) * sizeof(float));
            const T* x = static_cast<const T*>(a_.x) + m * a_.x_stride;
            valid &= integer_row(x, a_.w, passes_, to.records + m, a_.rows, sums);
        }
        return valid;
    }
    bool prepare_together(int threads) const {
        int invalid = 0;
        parallel_ranges(a_.rows, 1, threads, [&](int64_t lo, int64_t hi, int) {
            if (!prepare(x_, lo, hi)) __atomic_store_n(&invalid, 1, __ATOMIC_RELAXED);
        });
        return !invalid;
    }

    // Scales are read SPREAD at a time, past a row's end. After the last rows that is past the end of W, so
    // these are copied.
    static constexpr int LAST_ROWS = SPREAD > 1 ? SPREAD - 1 : 1;
    int64_t last_stride() const { return a_.w.groups + SPREAD - 1; }
    bool is_last(int64_t o) const { return o >= a_.w.out - LAST_ROWS; }
    Scale* last_row(int64_t o) const { return last_ + (a_.w.out - 1 - o) * last_stride(); }
    void copy_last_scales() {
        for (int64_t o = a_.w.out - 1; o >= 0 && is_last(o); o--)
            memcpy(last_row(o), static_cast<const Scale*>(a_.w.scales) + o * a_.w.scale_stride,
                   size_t(a_.w.groups) * sizeof(Scale));
    }
    DotRow<Scale> open_row(const Stream& stream, int64_t o) const {
        const WeightArgs& w = a_.w;
        const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + o * w.code_stride;
        return {codes, stream.ahead(codes),
                is_last(o) ? last_row(o) : static_cast<const Scale*>(w.scales) + o * w.scale_stride,
                w.mins ? static_cast<const Scale*>(w.mins) + o * w.min_stride : nullptr};
    }

    // Rows [o, o + n) of W.
    void tile(const Input& x, const Stream& stream, int64_t o, int n, vf* sums) const {
        DotRow<Scale> rows[TILE];
        for (int r = 0; r < TILE; r++)
            rows[r] = open_row(stream, o + (r < n ? r : n - 1));  // none reads those past n
        const int64_t m_tiles = (a_.rows + MAX_M - 1) / MAX_M, m_step = (a_.rows + m_tiles - 1) / m_tiles;
        const int64_t count = passes_.count();
        const int64_t cached = PANEL_BYTES / (m_step * int64_t(sizeof(Record))) + 1;
        const int64_t panel = cached < PANEL_PASSES ? cached : PANEL_PASSES;
        for (int64_t p = 0; p < count; p += panel)
            for (int64_t m = 0; m < a_.rows; m += m_step) {
                const int64_t left = a_.rows - m;
                panel_sums(x, rows, p, p + panel < count ? p + panel : count, m,
                           int(left < m_step ? left : m_step), sums + m * TILE);
            }
        for (int64_t m = 0; m < a_.rows; m++) finish(transpose_sum(sums + m * TILE), m, o, n);
    }

    void panel_sums(const Input& x, const DotRow<Scale>* rows, int64_t lo, int64_t hi, int64_t m, int count,
                    vf* sums) const {
        switch (count) {
            case 1:
                return panel_sums<1>(x, rows, lo, hi, m, sums);
            case 2:
                return panel_sums<2>(x, rows, lo, hi, m, sums);
            case 3:
                return panel_sums<3>(x, rows, lo, hi, m, sums);
            case 4:
                return panel_sums<4>(x, rows, lo, hi, m, sums);
        }
    }
    template <int M>
    void panel_sums(const Input& x, const DotRow<Scale>* rows, int64_t lo, int64_t hi, int64_t m,
                    vf* sums) const {
        constexpr int R = dot_rows(M, Codes::OPERANDS);
        const int64_t last = (a_.w.in - 1) / Codes::COLUMNS;
        const int rest = int(a_.w.in * BLOCK_BYTES / Codes::COLUMNS - last * BLOCK_BYTES);
        const DotInput<Record> in = {x.records,       x.sums,   passes_.block(), passes_.first(),
                                     passes_.lanes(), a_.rows,  groups_,         a_.w.groups,
                                     last,            rest};
        for (int r = 0; r < TILE; r += R)
            DotBlocks<Codes, LIMBS, Scale, M, R>::run(rows + r, in, m, lo, hi, sums + r);
    }

    void finish(vf y, int64_t m, int64_t o, int n) const {
        if (a_.bias) y = y + load_lanes(a_.bias, a_.bias_dtype, o, n);
        const int64_t at = m * a_.w.out + o;
        if (a_.dtype == DType::f32) store_n(static_cast<float*>(a_.out) + at, y, n);
        if (a_.dtype == DType::f16) store_n(static_cast<f16*>(a_.out) + at, y, n);
        if (a_.dtype == DType::bf16) store_n(static_cast<bf16*>(a_.out) + at, y, n);
    }
    static vf load_lanes(const void* p, DType dtype, int64_t at, int n) {
        if (dtype == DType::f32) return load_n(static_cast<const float*>(p) + at, n);
        if (dtype == DType::f16) return load_n(static_cast<const f16*>(p) + at, n);
        return load_n(static_cast<const bf16*>(p) + at, n);
    }

    const LinearArgs& a_;
    int64_t groups_;  // rounded up to vectors
    uintptr_t at_;    // where the workspace behind the passes begins
    Passes<Codes> passes_;
    Scale* last_;  // scales of the last rows of W
    Input x_;      // one for all threads, or the first one's
    size_t x_bytes_;
    vf* tile_sums_;  // each thread's: [rows][TILE]
};

// Calls body.template run<DotLinear<..>>() and returns its result; false for weights without a dot product.
template <class Codes, int LIMBS, class Body>
FA_INLINE bool with_scale(const LinearArgs& a, const Body& body) {
    if (a.w.scale_dtype == DType::f16) return body.template run<DotLinear<Codes, LIMBS, f16>>();
    return body.template run<DotLinear<Codes, LIMBS, float>>();
}
template <class Codes, class Body>
FA_INLINE bool with_limbs(const LinearArgs& a, const Body& body) {
    if (a.act_int8) return with_scale<Codes, 1>(a, body);
    return a.dtype == DType::f32 ? with_scale<Codes, 3>(a, body) : with_scale<Codes, 2>(a, body);
}
template <class Body>
FA_INLINE bool with_dot(const LinearArgs& a, const Body& body) {
    if (a.w.kind == WeightKind::int4) return with_limbs<DotInt4>(a, body);
    if (a.w.kind == WeightKind::int8) return with_limbs<DotInt8>(a, body);
    return false;
}

struct RunDot {
    const LinearArgs& a;
    int threads;
    void* workspace;
    template <class Linear>
    bool run() const {
        return Linear(a, threads, workspace).run(threads);
    }
};
// False when W or x is no matter of integers; nothing is written then.
static bool dot_linear(const LinearArgs& a, int threads, void* workspace) {
    return with_dot(a, RunDot{a, threads, workspace});
}

struct DotWorkspace {
    const LinearArgs& a;
    int threads;
    size_t& bytes;
    template <class Linear>
    bool run() const {
        bytes = Linear::workspace(a, threads);
        return true;
    }
};
static size_t dot_workspace(const LinearArgs& a, int threads) {
    size_t bytes = 0;
    with_dot(a, DotWorkspace{a, threads, bytes});
    return bytes;
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

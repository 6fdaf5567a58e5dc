// The linear layer on integer dot products: memory, threads, and the part of W that is constant in a group.
#pragma once

#include "ops_dot.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// W and x are multiplied in panels of columns: x stays in the first-level cache while the rows of a tile
// pass, and sums of sums err less than one long sum.
constexpr int64_t PANEL_BYTES = 16384, PANEL_BLOCKS = 64;
// Values of x that one thread prepares sooner than all threads would.
constexpr int64_t PREPARED_ALONE = 1 << 15;

// W = scale * (code - CENTER) + constant, with constant = min + CENTER * scale. The first term is a matter of
// integers; the second is added group by group, times the sum of x over the group.
template <class Codes, int LIMBS, class Scale>
class DotLinear {
    using Record = Limbs<Codes, LIMBS>;
    static constexpr int UNIT = dot_unit<Codes>();

public:
    DotLinear(const LinearArgs& a, void* workspace)
        : a_(a), units_((a.w.in + UNIT - 1) / UNIT), groups_((a.w.groups + W - 1) / W * W) {
        uintptr_t p = reinterpret_cast<uintptr_t>(workspace);
        const int64_t blocks = units_ * (UNIT / Codes::COLUMNS);
        x_ = take<Record>(p, blocks * a.rows);
        first_ = take<int32_t>(p, blocks);
        lanes_ = take<int32_t>(p, blocks * W);
        sums_ = take<float>(p, has_constants() ? a.rows * groups_ : 0);
        last_ = take<Scale>(p, LAST_ROWS * (a.w.groups + 3));
        thread_ = reinterpret_cast<vf*>(p);
    }

    static size_t workspace(const LinearArgs& a, int threads) {
        const DotLinear d(a, nullptr);
        return reinterpret_cast<uintptr_t>(d.thread_) + size_t(threads * d.thread_sums()) * sizeof(vf);
    }

    // False when the float kernel must do it: x may have values that integers do not cover.
    bool run(int threads) {
        if (a_.rows == 0 || a_.w.out == 0) return true;
        if (a_.w.in == 0 || a_.w.scale_stride == 0) return false;
        if (!prepare(threads)) return false;
        lane_groups();
        copy_last_scales();
        // Contiguous, so that what a thread fetches ahead is its own.
        parallel_ranges(a_.w.out, TILE, threads, [&](int64_t lo, int64_t hi, int thread) {
            for (int64_t o = lo; o < hi; o += TILE)
                tile(o, hi - o < TILE ? int(hi - o) : TILE, thread_ + thread * thread_sums());
        });
        return true;
    }

private:
    template <class T>
    static T* take(uintptr_t& p, int64_t n) {
        T* r = reinterpret_cast<T*>(p);
        p += aligned(size_t(n) * sizeof(T));
        return r;
    }
    int64_t thread_sums() const { return a_.rows * TILE; }
    bool has_constants() const { return a_.w.mins || Codes::CENTER; }

    template <class T>
    bool prepare_rows(int64_t lo, int64_t hi) {
        bool valid = true;
        for (int64_t m = lo; m < hi; m++) {
            float* sums = has_constants() ? sums_ + m * groups_ : nullptr;
            if (sums) memset(sums, 0, size_t(groups_) * sizeof(float));
            const T* x = static_cast<const T*>(a_.x) + m * a_.x_stride;
            valid &= integer_row(x, a_.w, x_ + m, a_.rows, sums);
        }
        return valid;
    }
    bool prepare(int threads) {
        int invalid = 0;
        parallel_ranges(a_.rows, 1, a_.rows * a_.w.in > PREPARED_ALONE ? threads : 1,
                        [&](int64_t lo, int64_t hi, int) {
                            const bool valid = a_.dtype == DType::f32   ? prepare_rows<float>(lo, hi)
                                               : a_.dtype == DType::f16 ? prepare_rows<f16>(lo, hi)
                                                                        : prepare_rows<bf16>(lo, hi);
                            if (!valid) __atomic_store_n(&invalid, 1, __ATOMIC_RELAXED);
                        });
        return !invalid;
    }

    // The group of each block's first column, and that of each lane less it.
    void lane_groups() {
        GroupCursor groups(a_.w);
        for (int64_t b = 0; b < units_ * (UNIT / Codes::COLUMNS); b += UNIT / Codes::COLUMNS) {
            int32_t group[UNIT / 16];
            for (int i = 0; i < UNIT / 16; i++) group[i] = int32_t(groups.next());
            for (int u = 0; u < UNIT / Codes::COLUMNS; u++) {
                const int32_t* of = group + u * Codes::COLUMNS / 16;
                first_[b + u] = of[0];
                for (int i = 0; i < W; i++)
                    lanes_[(b + u) * W + i] = of[Codes::column_of_lane(i) / 16] - of[0];
            }
        }
    }

    // Scales are read by fours, past a row's end. After the last rows that is past the end of W, so these are
    // copied.
    static constexpr int LAST_ROWS = 3;
    bool is_last(int64_t o) const { return o >= a_.w.out - LAST_ROWS; }
    Scale* last_row(int64_t o) const { return last_ + (a_.w.out - 1 - o) * (a_.w.groups + 3); }
    void copy_last_scales() {
        for (int64_t o = a_.w.out - 1; o >= 0 && is_last(o); o--)
            memcpy(last_row(o), static_cast<const Scale*>(a_.w.scales) + o * a_.w.scale_stride,
                   size_t(a_.w.groups) * sizeof(Scale));
    }
    DotRow<Scale> open_row(int64_t o) const {
        const WeightArgs& w = a_.w;
        return {static_cast<const uint8_t*>(w.codes) + o * w.code_stride,
                is_last(o) ? last_row(o) : static_cast<const Scale*>(w.scales) + o * w.scale_stride,
                w.mins ? static_cast<const Scale*>(w.mins) + o * w.min_stride : nullptr};
    }

    // The scales or mins of a tile, from the one at index `first` on.
    void fetch(const void* p, int64_t first) const {
        const char* at = static_cast<const char*>(p) + first * int64_t(sizeof(Scale));
        for (int64_t i = 0; i < a_.w.groups * TILE * int64_t(sizeof(Scale)); i += 64)
            __builtin_prefetch(at + i, 0, 2);
    }

    // Rows [o, o + n) of W.
    void tile(int64_t o, int n, vf* sums) const {
        DotRow<Scale> rows[TILE];
        fetch(a_.w.scales, (o + TILE) * a_.w.scale_stride);
        if (a_.w.mins) fetch(a_.w.mins, (o + TILE) * a_.w.min_stride);
        for (int r = 0; r < TILE; r++)
            rows[r] = open_row(o + (r < n ? r : n - 1));  // none reads those past n
        const int64_t m_tiles = (a_.rows + MAX_M - 1) / MAX_M, m_step = (a_.rows + m_tiles - 1) / m_tiles;
        const int64_t whole = (a_.w.in + Codes::COLUMNS - 1) / Codes::COLUMNS;
        const int64_t cached = PANEL_BYTES / (m_step * int64_t(sizeof(Record))) + 1;
        const int64_t panel = cached < PANEL_BLOCKS ? cached : PANEL_BLOCKS;
        for (int64_t b = 0; b < whole; b += panel)
            for (int64_t m = 0; m < a_.rows; m += m_step) {
                const int64_t left = a_.rows - m;
                panel_sums(rows, b, b + panel < whole ? b + panel : whole, m,
                           int(left < m_step ? left : m_step), sums + m * TILE);
            }
        for (int64_t m = 0; m < a_.rows; m++) finish(transpose_sum(sums + m * TILE), m, o, n);
    }

    void panel_sums(const DotRow<Scale>* rows, int64_t lo, int64_t hi, int64_t m, int count, vf* sums) const {
        switch (count) {
            case 1:
                return panel_sums<1>(rows, lo, hi, m, sums);
            case 2:
                return panel_sums<2>(rows, lo, hi, m, sums);
            case 3:
                return panel_sums<3>(rows, lo, hi, m, sums);
            case 4:
                return panel_sums<4>(rows, lo, hi, m, sums);
        }
    }
    template <int M>
    void panel_sums(const DotRow<Scale>* rows, int64_t lo, int64_t hi, int64_t m, vf* sums) const {
        constexpr int R = dot_rows(M, Codes::OPERANDS);
        const DotInput<Record> in = {x_, sums_, first_, lanes_, a_.rows, groups_, a_.w.groups};
        const int64_t row_bytes = a_.w.in * BLOCK_BYTES / Codes::COLUMNS, end = hi * BLOCK_BYTES;
        const int rest = int(end < row_bytes ? BLOCK_BYTES : row_bytes - (hi - 1) * BLOCK_BYTES);
        for (int r = 0; r < TILE; r += R)
            DotBlocks<Codes, LIMBS, Scale, M, R>::run(rows + r, in, m, lo, hi, rest, sums + r);
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
    int64_t units_, groups_;  // groups rounded up to vectors
    Record* x_;               // [block][rows]
    int32_t* first_;          // [block]
    int32_t* lanes_;          // [block][W]
    float* sums_;             // of x over groups: [rows][groups_]
    Scale* last_;             // scales of the last rows of W
    vf* thread_;              // each thread's sums: [rows][TILE]
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
    if (a.w.kind == WeightKind::int4 && grouping(a.w) == CHUNK_GROUPS) return with_limbs<DotInt4>(a, body);
    if (a.w.kind == WeightKind::int8 && grouping(a.w) != COLUMN_GROUPS) return with_limbs<DotInt8>(a, body);
    return false;
}

struct RunDot {
    const LinearArgs& a;
    int threads;
    void* workspace;
    template <class Linear>
    bool run() const {
        return Linear(a, workspace).run(threads);
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

// What a thread fetches into the second-level cache while it multiplies few rows of x.
//
// Rows of W follow each other in memory, but several are read at a time, and hardware prefetchers take that
// for many short streams. Past the thread's last row it fetches the head of the matrix that it reads next.
#pragma once

#include "ops_decode.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int TILE = W;  // rows of W whose sums are reduced together: what threads are given

constexpr int AHEAD = 24576;  // bytes of codes

FA_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
FA_INLINE void prefetch_span(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) prefetch(static_cast<const char*>(p) + i);
}

// Where the rows of a thread begin.
struct Head {
    const uint8_t* codes;
    const char *scales, *mins;  // null: none
    int64_t tile_bytes;         // of the scales, or mins, of a tile

    FA_INLINE_MEMBER void fetch_scales() const {
        if (scales) prefetch_span(scales, tile_bytes);
        if (mins) prefetch_span(mins, tile_bytes);
    }
};

FA_INLINE Head head_at(const WeightArgs& w, int64_t row) {
    const int64_t item = w.scale_dtype == DType::f16 ? 2 : 4;
    const auto at = [&](const void* p, int64_t stride) {
        return p ? static_cast<const char*>(p) + row * stride * item : nullptr;
    };
    return {static_cast<const uint8_t*>(w.codes) + row * w.code_stride * code_bytes(w),
            at(w.scales, w.scale_stride), at(w.mins, w.min_stride), w.groups * TILE * item};
}

// The stream of codes of one thread, rows [lo, hi) of W.
class Stream {
public:
    Stream(const LinearArgs& a, int64_t lo, int64_t hi, int thread) : end_(head_at(a.w, hi).codes) {
        const int team = omp_get_num_threads();
        if (a.next) {
            next_ = head_at(*a.next, range_begin(a.next->out, TILE, thread, team));
            return;
        }
        // Nobody has fetched this head, and the end fetches once more what it reads.
        const Head own = head_at(a.w, lo);
        prefetch_span(own.codes, AHEAD);
        own.fetch_scales();
        next_ = {nullptr, nullptr, nullptr, 0};
    }
    // What is fetched while a row with these codes is read.
    FA_INLINE_MEMBER const uint8_t* ahead(const uint8_t* codes) const {
        const uint8_t* p = codes + AHEAD;
        return p < end_ ? p : next_.codes ? next_.codes + (p - end_) : codes;
    }
    FA_INLINE_MEMBER const Head& next() const { return next_; }

private:
    const uint8_t* end_;
    Head next_;
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

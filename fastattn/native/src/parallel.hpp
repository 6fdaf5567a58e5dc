// Work distribution inside one kernel call.
//
// OpenMP is compiled in but not linked: its symbols are resolved by the runtime that torch has loaded, so
// one runtime and one pool of threads exist in the process. The caller holds the region lock (host.hpp)
// whenever threads > 1; a body must not throw.
#pragma once

#include <omp.h>

#include "simd.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

// Calls body(item, thread) for each item in [0, items), in order of demand. thread < threads.
template <class Body>
static void parallel_for(int64_t items, int threads, const Body& body) {
    if (threads > items) threads = int(items);
    if (threads <= 1) {
        for (int64_t i = 0; i < items; i++) body(i, 0);
        return;
    }
    int64_t next = 0;
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num();
        for (;;) {
            const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (i >= items) break;
            body(i, thread);
        }
    }
}

// Where the range of thread `thread` of `team` begins when [0, n) is split into contiguous ranges of
// multiples of `grain`; n for thread `team`.
FA_INLINE int64_t range_begin(int64_t n, int64_t grain, int64_t thread, int64_t team) {
    const int64_t begin = (n + grain - 1) / grain * thread / team * grain;
    return begin < n ? begin : n;
}

// Splits [0, n) into `threads` contiguous ranges of multiples of `grain`; calls body(lo, hi, thread).
template <class Body>
static void parallel_ranges(int64_t n, int64_t grain, int threads, const Body& body) {
    const int64_t grains = (n + grain - 1) / grain;
    if (threads > grains) threads = int(grains);
    if (threads <= 1) {
        if (n > 0) body(int64_t(0), n, 0);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        // The runtime may grant fewer threads than were asked for.
        const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
        const int64_t lo = range_begin(n, grain, thread, team), hi = range_begin(n, grain, thread + 1, team);
        if (lo < hi) body(lo, hi, int(thread));
    }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn

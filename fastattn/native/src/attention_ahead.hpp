// Prefetching of rows that the decode path reads next.
#pragma once

#include "attention_sequence.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

// Prefetches rows into the second-level cache in the order in which they lie in memory, a few lines at a
// time: a processor drops prefetches that come faster than its memory answers.
template <class T>
struct Ahead {
    const T* const* row;
    int64_t left;   // rows, the current one included
    int64_t bytes;  // of a row
    const char *p, *end;

    Ahead(const T* const* rows, int64_t count, int64_t row_bytes) : row(rows), left(count), bytes(row_bytes) {
        begin_row();
    }

    // The next N bytes; after the last row, that one again.
    template <int64_t N>
    FA_INLINE_MEMBER void fetch() {
#pragma GCC unroll 16
        for (int64_t i = 0; i < N; i += 64) __builtin_prefetch(p + i, 0, 2);
        p += N;
        if (__builtin_expect(p < end, true)) return;
        if (left > 1) {
            row++;
            left--;
        }
        begin_row();
    }

private:
    FA_INLINE_MEMBER void begin_row() {
        p = reinterpret_cast<const char*>(*row);
        end = p + bytes;
    }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn

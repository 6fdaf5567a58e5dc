// One sequence of an attention call: where its queries and keys lie, and which keys a query sees.
#pragma once

#include "attention_args.hpp"
#include "integers.hpp"
#include "parallel.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

struct Sequence {
    int64_t index;  // in the batch
    int64_t q_len, k_len;
    int64_t q_offset;  // elements from args.q to this sequence's first query, head 0
    int64_t out_offset;
    int64_t lse_offset;
    int64_t first_key;           // of the sequence in its cache row or pages
    int64_t k_offset, v_offset;  // of the cache row or packed range; unused with pages
    const int32_t* pages;
    int64_t shift;  // position of query 0 minus position of key 0
};

struct KeyRange {
    int64_t lo, hi;  // half open
};

static Sequence sequence(const AttentionArgs& a, int64_t b) {
    Sequence s;
    s.index = b;
    const int64_t q_first = a.cu_q ? a.cu_q[b] : 0;
    s.q_len = a.cu_q ? a.cu_q[b + 1] - q_first : a.q_len;
    s.q_offset = (a.cu_q ? 0 : b * a.q_batch) + q_first * a.q_seq;
    s.out_offset = (a.cu_q ? 0 : b * a.out_batch) + q_first * a.out_seq;
    s.lse_offset = (a.cu_q ? 0 : b * a.lse_batch) + q_first;

    const int64_t packed_first = a.cu_k ? a.cu_k[b] : 0;
    const int64_t stored = a.cu_k ? a.cu_k[b + 1] - packed_first : a.k_len;
    s.first_key = a.leftpad ? a.leftpad[b] : 0;
    s.k_len = (a.used_k ? a.used_k[b] : stored) - s.first_key;
    const int64_t row = a.cu_k ? 0 : a.batch_idx ? a.batch_idx[b] : b;
    s.k_offset = row * a.k_batch + packed_first * a.k_seq;
    s.v_offset = row * a.v_batch + packed_first * a.v_seq;
    s.pages = a.block_table ? a.block_table + b * a.table_batch : nullptr;

    const int64_t k_pos0 = a.k_pos0 ? a.k_pos0[b] : 0;
    s.shift = a.q_pos0 ? a.q_pos0[b] - k_pos0 : s.k_len - s.q_len;
    return s;
}

// Keys that query i sees, by causality and window.
FA_INLINE KeyRange visible(const AttentionArgs& a, const Sequence& s, int64_t i) {
    const int64_t lo = a.left < 0 ? 0 : imax(0, i + s.shift - a.left);
    const int64_t hi = a.right < 0 ? s.k_len : imin(s.k_len, i + s.shift + a.right + 1);
    return {imin(lo, s.k_len), hi};
}

// Keys that any query of [first, end) sees.
FA_INLINE KeyRange visible(const AttentionArgs& a, const Sequence& s, int64_t first, int64_t end) {
    return {visible(a, s, first).lo, visible(a, s, end - 1).hi};
}

// Addresses of the rows of keys [lo, hi) of one head: rows[j - lo].
template <class T>
static void row_pointers(const T* base, int64_t offset, int64_t batch_stride, int64_t seq_stride,
                         const Sequence& s, int64_t page_size, int64_t lo, int64_t hi, const T** rows) {
    int64_t t = s.first_key + lo;
    const int64_t end = s.first_key + hi;
    if (!s.pages) {
        const T* p = base + offset + t * seq_stride;
        for (; t < end; t++, p += seq_stride) *rows++ = p;
        return;
    }
    while (t < end) {
        const int64_t page = t / page_size, slot = t % page_size, stop = imin(end, (page + 1) * page_size);
        const T* p = base + int64_t(s.pages[page]) * batch_stride + slot * seq_stride;
        for (; t < stop; t++, p += seq_stride) *rows++ = p;
    }
}

template <class T>
FA_INLINE void key_rows(const AttentionArgs& a, const Sequence& s, int64_t head, int64_t lo, int64_t hi,
                        const T** rows) {
    row_pointers(static_cast<const T*>(a.k) + head * a.k_head, s.k_offset, a.k_batch, a.k_seq, s, a.page_size,
                 lo, hi, rows);
}
template <class T>
FA_INLINE void value_rows(const AttentionArgs& a, const Sequence& s, int64_t head, int64_t lo, int64_t hi,
                          const T** rows) {
    row_pointers(static_cast<const T*>(a.v) + head * a.v_head, s.v_offset, a.v_batch, a.v_seq, s, a.page_size,
                 lo, hi, rows);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn

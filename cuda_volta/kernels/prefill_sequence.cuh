// One sequence as one block sees it: lengths, first rows, and which keys its queries may see.
#pragma once

#include "prefill_layout.cuh"
#include "prefill_params.cuh"

namespace volta {

VOLTA_DEVICE i32 clamp(i32 x, i32 lowest, i32 highest) {
    return x < lowest ? lowest : x > highest ? highest : x;
}

// Lengths and indices that live on the device are clamped to what the tensors hold.
struct Sequence {
    i32 q_len, k_len;
    i32 q_row;     // first row of q; of the sequence's own rows unless packed
    i32 k_row;     // first row of k in its sequence, its pages, or packed
    i32 k_batch;   // sequence in the cache
    i64 diagonal;  // query i stands at key position i + diagonal
    const i32* pages;

    VOLTA_DEVICE Sequence(const PrefillParams& p, u32 batch) : q_row(0), k_row(0), k_batch(batch), pages(nullptr) {
        q_len = p.seqlen_q;
        if (p.cu_seqlens_q) {
            q_row = clamp(ldg(p.cu_seqlens_q + batch), 0, p.seqlen_q);
            q_len = clamp(ldg(p.cu_seqlens_q + batch + 1), q_row, p.seqlen_q) - q_row;
        }
        i32 capacity = p.seqlen_k;
        if (p.block_table) {
            k_batch = 0;
            pages = p.block_table + static_cast<u64>(batch) * p.table_width;
        } else if (p.cu_seqlens_k) {
            k_batch = 0;
            k_row = clamp(ldg(p.cu_seqlens_k + batch), 0, p.seqlen_k);
            capacity = clamp(ldg(p.cu_seqlens_k + batch + 1), k_row, p.seqlen_k) - k_row;
        } else if (p.cache_batch_idx) {
            k_batch = clamp(ldg(p.cache_batch_idx + batch), 0, p.cache_rows - 1);
        }
        i32 used = p.seqused_k ? clamp(ldg(p.seqused_k + batch), 0, capacity) : capacity;
        i32 pad = p.cache_leftpad ? clamp(ldg(p.cache_leftpad + batch), 0, used) : 0;
        k_row += pad;
        k_len = used - pad;
        i64 k_start = p.k_pos0 ? ldg(p.k_pos0 + batch) : 0;
        diagonal = p.q_pos0 ? ldg(p.q_pos0 + batch) - k_start : static_cast<i64>(k_len) - q_len;
    }
};

// The keys that one query sees: first..last, none if last < first.
struct Span {
    i32 first, last;

    VOLTA_DEVICE Span(const PrefillParams& p, const Sequence& s, i32 query) : first(0), last(s.k_len - 1) {
        i64 at = s.diagonal + query;
        if (p.left >= 0) {
            i64 bound = at - p.left;
            first = static_cast<i32>(bound < 0 ? 0 : bound < s.k_len ? bound : s.k_len);
        }
        if (p.right >= 0) {
            i64 bound = at + p.right;
            last = static_cast<i32>(bound < -1 ? -1 : bound < last ? bound : last);
        }
    }
};

// The tiles of keys that a block of queries visits. Softmax does not mind the order, so those that a bound
// crosses come first, in a loop with a mask; the loop over the others has none.
struct TileRange {
    i32 first, inner_first, inner_last;
    i32 edges, count;

    VOLTA_DEVICE TileRange(const PrefillParams& p, const Sequence& s, i32 query0) {
        i32 query1 = clamp(query0 + BLOCK_Q - 1, 0, s.q_len - 1);
        Span top(p, s, query0), bottom(p, s, query1);
        first = top.first / BLOCK_K;
        i32 end = bottom.last < top.first ? first : bottom.last / BLOCK_K + 1;
        inner_first = clamp((bottom.first + BLOCK_K - 1) / BLOCK_K, first, end);
        inner_last = clamp((top.last + 1) / BLOCK_K, inner_first, end);
        count = end - first;
        edges = count - (inner_last - inner_first);
    }

    // First key of the i-th tile.
    VOLTA_DEVICE i32 key(i32 i) const {
        i32 left = inner_first - first;
        i32 tile = i < left ? first + i : i < edges ? inner_last + i - left : inner_first + i - edges;
        return tile * BLOCK_K;
    }
};

}  // namespace volta

// One attention call as the kernels see it, and where its sequences, keys and visible bands lie.
//
// Whatever was read from a tensor (lengths, pages, rows) is clamped to the memory that exists: a wrong value
// gives a wrong result, never an access outside.
#pragma once

#include "primitives.cuh"

namespace volta {

// Mirrored by cuda_volta/attention_params.py. Strides count elements; absent tensors are null.
struct AttentionParams {
    const u16* q;
    const u16* k;
    const u16* v;
    u16* out;
    float* lse;               // natural log; null: not asked for
    const float* alibi_slopes;
    const float* sinks;
    const void* attn_mask;
    const i32* cu_seqlens_q;
    const i32* cu_seqlens_k;
    const i32* block_table;
    const i32* seqused_k;
    const i32* cache_batch_idx;
    const i32* cache_leftpad;
    const i32* q_pos0;
    const i32* k_pos0;
    const float* k_scale;
    const float* v_scale;
    float* partial_out;       // decode: (q rows, heads, splits, partial_width), each split's own softmax
    float* partial_lse;       // decode: (q rows, heads, splits), base 2
    i64 q_batch, q_row, q_head;
    i64 k_batch, k_row, k_head;  // k_batch, v_batch: of a page where keys are paged
    i64 v_batch, v_row, v_head;
    i64 out_batch, out_row, out_head;
    i64 lse_batch, lse_head;
    i64 mask_batch, mask_head, mask_row, mask_key;
    i32 batch;
    i32 first_batch;          // of a launch of prefill
    i32 heads, kv_heads;
    i32 head_dim, v_head_dim;
    i32 q_rows;               // of a sequence; packed: of all
    i32 max_seqlen_q;
    i32 k_rows;               // of a sequence; packed: of all; paged: of a page
    i32 k_batches;            // rows of a contiguous cache, or pages
    i32 max_pages;            // of a sequence
    i32 page_rows;            // rows from a page to the next, of k and of v; 0: not a whole number of rows
    u32 page_magic, page_shift;  // row / k_rows = (2 row * page_magic >> 32) >> page_shift
    i32 alibi_batch;          // stride; 0: slopes are per head only
    i32 mask_kind;            // MASK_*
    i32 left, right;          // visible band, NO_BOUND: unbounded
    i32 splits, partial_width;  // decode
    float scale, softcap;
};

enum : i32 { MASK_NONE = 0, MASK_BOOL = 1, MASK_HALF = 2, MASK_FLOAT = 3 };
constexpr i32 NO_BOUND = -1;
constexpr i32 FAR = 1 << 29;  // past any position: sums of two still fit into 32 bits
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

VOLTA_DEVICE float infinity() { return bits_float(0x7f800000); }
VOLTA_DEVICE i32 clamp(i32 x, i32 low, i32 high) { return x < low ? low : x > high ? high : x; }

// One sequence of the batch. Query i stands at position i + shift, key j at position j.
struct Sequence {
    i32 q_begin;  // first row of packed queries, else 0
    i32 q_len;
    i32 k_begin;  // cache row of key 0, counted in the sequence's own pages, row or packed span
    i32 k_len;
    i32 k_batch;  // row of a contiguous cache
    i32 shift;
};

VOLTA_DEVICE Sequence find_sequence(const AttentionParams& p, i32 b) {
    Sequence s;
    s.q_begin = 0;
    s.q_len = p.q_rows;
    if (p.cu_seqlens_q) {
        s.q_begin = clamp(ldg(p.cu_seqlens_q + b), 0, p.q_rows);
        s.q_len = clamp(ldg(p.cu_seqlens_q + b + 1), s.q_begin, p.q_rows) - s.q_begin;
        s.q_len = s.q_len < p.max_seqlen_q ? s.q_len : p.max_seqlen_q;
    }
    s.k_batch = p.cache_batch_idx ? clamp(ldg(p.cache_batch_idx + b), 0, p.k_batches - 1) : b;
    i32 first = 0;
    i32 rows = p.k_rows;
    if (p.block_table) {
        rows = p.seqused_k ? p.k_rows * p.max_pages : 0;
    } else if (p.cu_seqlens_k) {
        first = clamp(ldg(p.cu_seqlens_k + b), 0, p.k_rows);
        rows = clamp(ldg(p.cu_seqlens_k + b + 1), first, p.k_rows) - first;
    }
    if (p.seqused_k) rows = clamp(ldg(p.seqused_k + b), 0, rows);
    const i32 skipped = p.cache_leftpad ? clamp(ldg(p.cache_leftpad + b), 0, rows) : 0;
    s.k_begin = first + skipped;
    s.k_len = rows - skipped;
    s.shift = s.k_len - s.q_len;
    if (p.q_pos0) {
        const i64 first_key = p.k_pos0 ? ldg(p.k_pos0 + b) : 0;
        const i64 shift = ldg(p.q_pos0 + b) - first_key;
        s.shift = shift < -FAR ? -FAR : shift > FAR ? FAR : static_cast<i32>(shift);
    }
    return s;
}

// The keys that query i sees, [first, last].
struct Band {
    i32 first, last;
};
VOLTA_DEVICE Band visible_band(const AttentionParams& p, const Sequence& s, i32 i) {
    const i32 position = i + s.shift;
    Band band{0, s.k_len - 1};
    if (p.left != NO_BOUND && position - p.left > 0) band.first = position - p.left;
    if (p.right != NO_BOUND && position + p.right < band.last) band.last = position + p.right;
    return band;
}

// Where key j of a sequence is stored: a page or a cache row, and the row in it.
struct KeyPlace {
    i32 batch, row;
};
VOLTA_DEVICE KeyPlace key_place(const AttentionParams& p, const Sequence& s, i32 b, i32 j) {
    const i32 row = s.k_begin + j;
    if (!p.block_table) return {p.cu_seqlens_k ? 0 : s.k_batch, row};
    const u32 page = static_cast<u32>(static_cast<u64>(2 * row) * p.page_magic >> 32) >> p.page_shift;
    const i32 stored = ldg(p.block_table + static_cast<i64>(b) * p.max_pages + page);
    return {clamp(stored, 0, p.k_batches - 1), row - static_cast<i32>(page) * p.k_rows};
}

// softcap * tanh(x / softcap). A small quotient takes the series: the exponential errs by a part of the cap.
VOLTA_DEVICE float soft_cap(float x, float cap, float inverse_cap) {
    const float t = x * inverse_cap;
    const float t2 = t * t;
    if (t2 < 0.0625f) return x + x * t2 * (-1.0f / 3.0f + t2 * (2.0f / 15.0f - t2 * (17.0f / 315.0f)));
    const float e = exp2_approx(2.0f * LOG2_E * inverse_cap * x);
    return cap - 2.0f * cap * rcp_approx(e + 1.0f);
}

// What element `at` of attn_mask adds to a score, base 2; a finite mask stays finite.
VOLTA_DEVICE float mask_value(const AttentionParams& p, i64 at) {
    if (p.mask_kind == MASK_BOOL) return ldg(static_cast<const u8*>(p.attn_mask) + at) ? 0.0f : -infinity();
    const float x = p.mask_kind == MASK_HALF ? from_half(ldg(static_cast<const u16*>(p.attn_mask) + at))
                                             : ldg(static_cast<const float*>(p.attn_mask) + at);
    const float scaled = x * LOG2_E;
    return scaled < -3e38f && x > -infinity() ? -3e38f : scaled;
}

// What attn_mask adds to the score of (b, h, i, key j).
VOLTA_DEVICE float mask_bias(const AttentionParams& p, const Sequence& s, i32 b, i32 h, i32 i, i32 j) {
    return mask_value(p, b * p.mask_batch + h * p.mask_head + i * p.mask_row + (s.k_begin + j) * p.mask_key);
}

}  // namespace volta

// The arguments of a prefill kernel. Mirrored by cuda_volta/prefill.py; strides count elements.
#pragma once

#include "primitives.cuh"

namespace volta {

struct Strides3 {
    i64 batch, row, head;  // batch: of a sequence or a page; 0 for packed sequences
};
struct Strides4 {
    i64 batch, head, row, column;
};

struct PrefillParams {
    const u16* q;
    const u16* k;
    const u16* v;
    u16* out;
    float* lse;  // null: not wanted
    const i32* cu_seqlens_q;
    const i32* cu_seqlens_k;
    const i32* block_table;
    const i32* seqused_k;
    const i32* cache_batch_idx;
    const i32* cache_leftpad;
    const i32* q_pos0;
    const i32* k_pos0;
    const float* sinks;
    const float* k_scale;
    const float* v_scale;
    const float* alibi_slopes;
    const void* mask;
    Strides3 q_strides, k_strides, v_strides, out_strides;
    Strides4 mask_strides;
    i64 lse_batch, lse_head, alibi_batch;
    i32 seqlen_q;        // rows of a sequence; packed: of all sequences
    i32 seqlen_k;        // rows of a sequence in the cache; packed: of all sequences
    i32 heads_per_kv;
    i32 head_dim, v_head_dim;
    i32 left, right;     // of the window, causality included; negative: unbounded
    i32 page_size, pages, table_width;  // table_width: pages a sequence may have
    i32 page_rows;                      // rows from one page to the next
    u32 page_magic, page_shift;         // row / page_size = row * page_magic >> 32 >> page_shift
    i32 cache_rows;      // sequences that k and v have room for
    i32 mask_kind;       // 0 none, 1 bool, 2 float16, 3 float32
    i32 aligned;         // rows of q, k, v and out start at multiples of 16 bytes
    float scale;         // of the scores
    float softcap;       // 0: none
};

}  // namespace volta

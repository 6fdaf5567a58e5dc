// One attention call as plain pointers and strides (in elements); validated before a kernel sees it.
#pragma once

#include "common.hpp"

namespace fastattn {

struct AttentionArgs {
    DType dtype;  // of q, k, v and out
    const void* q;
    const void* k;
    const void* v;
    void* out;
    float* lse;                      // may be null
    int64_t q_batch, q_seq, q_head;  // strides; packed input: q_batch is 0
    int64_t k_batch, k_seq, k_head;  // k_batch: of a cache row, or of a page
    int64_t v_batch, v_seq, v_head;
    int64_t out_batch, out_seq, out_head;
    int64_t lse_batch, lse_head;  // lse's sequence stride is 1
    int64_t batch, heads, kv_heads, head_dim, v_head_dim;
    int64_t q_len, k_len;  // of dense input
    float scale, softcap;
    int64_t left, right;  // window; negative: unbounded
    const int32_t* cu_q;  // null: dense
    const int32_t* cu_k;
    const int32_t* used_k;
    const int32_t* batch_idx;
    const int32_t* leftpad;
    const int32_t* q_pos0;
    const int32_t* k_pos0;
    const int32_t* block_table;
    int64_t table_batch, page_size;  // page_size 0: not paged
    const float* alibi;
    int64_t alibi_batch;
    const float* sinks;
    const void* mask;
    DType mask_dtype;
    int64_t mask_batch, mask_head, mask_q, mask_k;
    const float* k_scale;
    const float* v_scale;
};

}  // namespace fastattn

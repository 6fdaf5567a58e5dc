// Runs attention of one instruction set outside Python: reads cases from standard input until it ends and
// writes out and lse of each to standard output. test_attention.py says what a case consists of.
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "attention.hpp"

using namespace fastattn;

namespace {

bool read_exactly(void* p, size_t n) { return fread(p, 1, n, stdin) == n; }

int64_t number() {
    int64_t n;
    if (!read_exactly(&n, sizeof n)) exit(3);
    return n;
}

float real() {
    double x;
    if (!read_exactly(&x, sizeof x)) exit(3);
    return float(x);
}

using Bytes = std::vector<char>;

Bytes blob() {
    Bytes bytes(static_cast<size_t>(number()));
    if (!read_exactly(bytes.data(), bytes.size())) exit(3);
    return bytes;
}

template <class T>
const T* data_or_null(const Bytes& b) {
    return b.empty() ? nullptr : reinterpret_cast<const T*>(b.data());
}

void strides(int64_t& batch, int64_t& seq, int64_t& head) {
    batch = number();
    seq = number();
    head = number();
}

void run_case(int threads) {
    AttentionArgs a = {};
    a.dtype = DType(number());
    for (int64_t* field : {&a.batch, &a.heads, &a.kv_heads, &a.head_dim, &a.v_head_dim, &a.q_len, &a.k_len,
                           &a.page_size, &a.left, &a.right})
        *field = number();
    strides(a.q_batch, a.q_seq, a.q_head);
    strides(a.k_batch, a.k_seq, a.k_head);
    strides(a.v_batch, a.v_seq, a.v_head);
    strides(a.out_batch, a.out_seq, a.out_head);
    a.lse_batch = number();
    a.lse_head = number();
    a.table_batch = number();
    a.alibi_batch = number();
    a.mask_dtype = DType(number());
    strides(a.mask_batch, a.mask_head, a.mask_q);
    a.mask_k = number();
    a.scale = real();
    a.softcap = real();
    Bytes out(static_cast<size_t>(number())), lse(static_cast<size_t>(number()));
    const Bytes q = blob(), k = blob(), v = blob(), cu_q = blob(), cu_k = blob(), used_k = blob(),
                batch_idx = blob(), leftpad = blob(), q_pos0 = blob(), k_pos0 = blob(), table = blob(),
                alibi = blob(), sinks = blob(), mask = blob(), k_scale = blob(), v_scale = blob();
    a.q = q.data();
    a.k = k.data();
    a.v = v.data();
    a.out = out.data();
    a.lse = reinterpret_cast<float*>(lse.data());
    a.cu_q = data_or_null<int32_t>(cu_q);
    a.cu_k = data_or_null<int32_t>(cu_k);
    a.used_k = data_or_null<int32_t>(used_k);
    a.batch_idx = data_or_null<int32_t>(batch_idx);
    a.leftpad = data_or_null<int32_t>(leftpad);
    a.q_pos0 = data_or_null<int32_t>(q_pos0);
    a.k_pos0 = data_or_null<int32_t>(k_pos0);
    a.block_table = data_or_null<int32_t>(table);
    a.alibi = data_or_null<float>(alibi);
    a.sinks = data_or_null<float>(sinks);
    a.mask = data_or_null<char>(mask);
    a.k_scale = data_or_null<float>(k_scale);
    a.v_scale = data_or_null<float>(v_scale);

    const size_t bytes = (FASTATTN_ISA::attention_workspace(a, threads) + 63) / 64 * 64;
    void* memory = aligned_alloc(64, bytes);
    if (!memory) exit(4);
    FASTATTN_ISA::attention(a, threads, memory);
    free(memory);
    fwrite(out.data(), 1, out.size(), stdout);
    fwrite(lse.data(), 1, lse.size(), stdout);
}

}  // namespace

int main() {
    for (int threads = 1;; threads = 3 - threads) {
        const int next = getc(stdin);
        if (next == EOF) return 0;
        ungetc(next, stdin);
        run_case(threads);
    }
}

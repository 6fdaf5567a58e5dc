// Lengths, cache rows and pages of an attention call.
#include "checks.hpp"

namespace fastattn {

namespace {

using std::string;
using std::to_string;

py::value_error bad_value(const char* name, int64_t i, int64_t value, const string& expected) {
    return py::value_error(string(name) + "[" + to_string(i) + "] is " + to_string(value) + ", " + expected);
}

string up_to(int64_t most) { return "expected 0 to " + to_string(most); }

void check_cumulative(const int32_t* cu, const char* name, int64_t batch, int64_t total) {
    if (!cu) return;
    if (cu[0] != 0) throw bad_value(name, 0, cu[0], "expected 0");
    for (int64_t b = 0; b < batch; b++)
        if (cu[b + 1] < cu[b])
            throw bad_value(name, b + 1, cu[b + 1], "less than the one before it, " + to_string(cu[b]));
    if (cu[batch] > total)
        throw bad_value(name, batch, cu[batch], "but only " + to_string(total) + " rows are there");
}

}  // namespace

void check_lengths(const AttentionArgs& a, int64_t q_total, int64_t k_total, int64_t cache_rows,
                   int64_t max_pages) {
    check_cumulative(a.cu_q, "cu_seqlens_q", a.batch, q_total);
    check_cumulative(a.cu_k, "cu_seqlens_k", a.batch, k_total);
    for (int64_t b = 0; b < a.batch; b++) {
        const int64_t stored = a.block_table ? max_pages * a.page_size
                               : a.cu_k      ? a.cu_k[b + 1] - a.cu_k[b]
                                             : a.k_len;
        const int64_t used = a.used_k ? a.used_k[b] : stored;
        if (used < 0 || used > stored)
            throw bad_value("cache_seqlens", b, used, up_to(stored) + ", the keys that its cache holds");
        if (a.leftpad && (a.leftpad[b] < 0 || a.leftpad[b] > used))
            throw bad_value("cache_leftpad", b, a.leftpad[b], up_to(used) + ", the keys in use");
        if (a.batch_idx && (a.batch_idx[b] < 0 || a.batch_idx[b] >= cache_rows))
            throw bad_value("cache_batch_idx", b, a.batch_idx[b], up_to(cache_rows - 1));
        for (int64_t p = 0; a.block_table && p * a.page_size < used; p++) {
            const int64_t page = a.block_table[b * a.table_batch + p];
            if (page >= 0 && page < cache_rows) continue;
            throw py::value_error("block_table[" + to_string(b) + ", " + to_string(p) + "] is " +
                                  to_string(page) + ", " + up_to(cache_rows - 1));
        }
    }
}

}  // namespace fastattn

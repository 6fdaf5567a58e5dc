// kernels.attention: checks what a kernel would otherwise read out of bounds, then runs it.
#include <string>

#include "host.hpp"

namespace fastattn {

namespace {

using std::to_string;

[[noreturn]] void bad(const std::string& message) { throw py::value_error(message); }

std::string shape_text(const Tensor& t) {
    std::string text = "(";
    for (int i = 0; i < t.ndim; i++) text += (i ? ", " : "") + to_string(t.shape[i]);
    return text + ")";
}

void expect_dtype(const Tensor& t, const char* name, DType dtype) {
    if (t.dtype != dtype)
        bad(std::string(name) + ": " + dtype_name(t.dtype) + ", expected " + dtype_name(dtype));
}

void expect_dims(const Tensor& t, const char* name, int ndim) {
    if (t.ndim != ndim)
        bad(std::string(name) + ": shape " + shape_text(t) + ", expected " + to_string(ndim) + " dimensions");
}

// q, k, v or out: the last dimension contiguous.
Tensor rows(py::handle object, const char* name, int ndim) {
    const Tensor t = tensor(object, name);
    expect_dims(t, name, ndim);
    if (t.stride[ndim - 1] != 1 && t.shape[ndim - 1] > 1)
        bad(std::string(name) + ": the last dimension is not contiguous");
    return t;
}

// A contiguous vector of n elements; null for None.
template <class T>
const T* vector(py::handle object, const char* name, DType dtype, int64_t n) {
    const std::optional<Tensor> t = maybe_tensor(object, name);
    if (!t) return nullptr;
    expect_dtype(*t, name, dtype);
    if (t->ndim != 1 || t->shape[0] != n)
        bad(std::string(name) + ": shape " + shape_text(*t) + ", expected (" + to_string(n) + ",)");
    if (n > 1 && t->stride[0] != 1) bad(std::string(name) + ": not contiguous");
    return static_cast<const T*>(t->data);
}

std::string at(const char* name, int64_t i, int64_t value) {
    return std::string(name) + "[" + to_string(i) + "] is " + to_string(value);
}

void check_cumulative(const int32_t* cu, const char* name, int64_t batch, int64_t total) {
    if (!cu) return;
    if (cu[0] != 0) bad(at(name, 0, cu[0]) + ", expected 0");
    for (int64_t b = 0; b < batch; b++)
        if (cu[b + 1] < cu[b])
            bad(at(name, b + 1, cu[b + 1]) + ", less than the one before it, " + to_string(cu[b]));
    if (cu[batch] > total)
        bad(at(name, batch, cu[batch]) + ", but only " + to_string(total) + " rows are there");
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
            bad(at("cache_seqlens", b, used) + ", expected 0 to " + to_string(stored) +
                ", the keys that its cache holds");
        if (a.leftpad && (a.leftpad[b] < 0 || a.leftpad[b] > used))
            bad(at("cache_leftpad", b, a.leftpad[b]) + ", expected 0 to " + to_string(used) +
                ", the keys in use");
        if (a.batch_idx && (a.batch_idx[b] < 0 || a.batch_idx[b] >= cache_rows))
            bad(at("cache_batch_idx", b, a.batch_idx[b]) + ", expected 0 to " + to_string(cache_rows - 1));
        if (!a.block_table) continue;
        for (int64_t p = 0; p * a.page_size < used; p++) {
            const int64_t page = a.block_table[b * a.table_batch + p];
            if (page < 0 || page >= cache_rows)
                bad("block_table[" + to_string(b) + ", " + to_string(p) + "] is " + to_string(page) +
                    ", expected 0 to " + to_string(cache_rows - 1));
        }
    }
}

namespace {

// A side of the window; -1: unbounded. Cut far beyond any position, so that no sum with it overflows.
int64_t bound(const py::handle& side) {
    constexpr int64_t widest = int64_t(1) << 40;
    const int64_t value = side.is_none() ? -1 : side.cast<int64_t>();
    return value < widest ? value : widest;
}

void attention(py::handle q_, py::handle k_, py::handle v_, py::handle out_, py::handle lse_, double scale,
               double softcap, py::handle left, py::handle right, py::handle alibi_slopes, py::handle sinks,
               py::handle attn_mask, py::handle cu_seqlens_q, py::handle cu_seqlens_k, py::handle block_table,
               py::handle seqused_k, py::handle cache_batch_idx, py::handle cache_leftpad, py::handle q_pos0,
               py::handle k_pos0, py::handle k_scale, py::handle v_scale, int threads) {
    AttentionArgs a = {};
    const bool packed_q = !cu_seqlens_q.is_none(), paged = !block_table.is_none();
    const bool packed_k = !cu_seqlens_k.is_none() && !paged;
    const int q_dims = packed_q ? 3 : 4, k_dims = packed_k ? 3 : 4;
    const Tensor q = rows(q_, "q", q_dims), out = rows(out_, "out", q_dims);
    const Tensor k = rows(k_, "k", k_dims), v = rows(v_, "v", k_dims);
    if (q.dtype != DType::f32 && q.dtype != DType::f16 && q.dtype != DType::bf16)
        bad(std::string("q: ") + dtype_name(q.dtype) + ", expected float32, float16 or bfloat16");
    expect_dtype(k, "k", q.dtype);
    expect_dtype(v, "v", q.dtype);
    expect_dtype(out, "out", q.dtype);
    a.dtype = q.dtype;
    a.q = q.data;
    a.k = k.data;
    a.v = v.data;
    a.out = out.data;
    a.heads = q.shape[q_dims - 2];
    a.kv_heads = k.shape[k_dims - 2];
    a.head_dim = q.shape[q_dims - 1];
    a.v_head_dim = v.shape[k_dims - 1];
    if (a.head_dim < 1 || a.v_head_dim < 1) bad("head_dim: expected at least 1");
    if (a.kv_heads < 1 || a.heads % a.kv_heads)
        bad("k: " + to_string(a.kv_heads) + " heads, expected a divisor of q's " + to_string(a.heads));
    if (k.shape[k_dims - 1] != a.head_dim)
        bad("k: shape " + shape_text(k) + ", but q's head_dim is " + to_string(a.head_dim));
    for (int i = 0; i < k_dims - 1; i++)
        if (v.shape[i] != k.shape[i])
            bad("v: shape " + shape_text(v) + " does not match k's " + shape_text(k));
    for (int i = 0; i < q_dims; i++)
        if (out.shape[i] != (i == q_dims - 1 ? a.v_head_dim : q.shape[i]))
            bad("out: shape " + shape_text(out) + " does not match q's " + shape_text(q));

    const int qs = q_dims - 3, ks = k_dims - 3;  // index of the sequence dimension
    a.q_seq = q.stride[qs], a.q_head = q.stride[qs + 1], a.q_batch = packed_q ? 0 : q.stride[0];
    a.out_seq = out.stride[qs], a.out_head = out.stride[qs + 1], a.out_batch = packed_q ? 0 : out.stride[0];
    a.k_seq = k.stride[ks], a.k_head = k.stride[ks + 1], a.k_batch = packed_k ? 0 : k.stride[0];
    a.v_seq = v.stride[ks], a.v_head = v.stride[ks + 1], a.v_batch = packed_k ? 0 : v.stride[0];
    a.q_len = packed_q ? 0 : q.shape[1];
    a.k_len = packed_k || paged ? 0 : k.shape[1];
    if (packed_q) {
        const Tensor cu = tensor(cu_seqlens_q, "cu_seqlens_q");
        if (cu.ndim != 1 || cu.shape[0] < 1)
            bad("cu_seqlens_q: shape " + shape_text(cu) + ", expected (batch + 1,)");
        a.batch = cu.shape[0] - 1;
    } else {
        a.batch = q.shape[0];
    }
    a.cu_q = vector<int32_t>(cu_seqlens_q, "cu_seqlens_q", DType::i32, a.batch + 1);
    if (packed_k) a.cu_k = vector<int32_t>(cu_seqlens_k, "cu_seqlens_k", DType::i32, a.batch + 1);
    a.used_k = vector<int32_t>(seqused_k, "cache_seqlens", DType::i32, a.batch);
    a.batch_idx = vector<int32_t>(cache_batch_idx, "cache_batch_idx", DType::i32, a.batch);
    a.leftpad = vector<int32_t>(cache_leftpad, "cache_leftpad", DType::i32, a.batch);
    a.q_pos0 = vector<int32_t>(q_pos0, "q_pos0", DType::i32, a.batch);
    a.k_pos0 = vector<int32_t>(k_pos0, "k_pos0", DType::i32, a.batch);
    a.sinks = vector<float>(sinks, "sinks", DType::f32, a.heads);
    a.k_scale = vector<float>(k_scale, "k_scale", DType::f32, a.kv_heads);
    a.v_scale = vector<float>(v_scale, "v_scale", DType::f32, a.kv_heads);
    int64_t max_pages = 0;
    if (paged) {
        const Tensor table = tensor(block_table, "block_table");
        expect_dims(table, "block_table", 2);
        expect_dtype(table, "block_table", DType::i32);
        if (table.shape[0] != a.batch)
            bad("block_table: shape " + shape_text(table) + ", expected (" + to_string(a.batch) +
                ", max_pages)");
        if (table.stride[1] != 1 && table.shape[1] > 1)
            bad("block_table: the last dimension is not contiguous");
        if (!a.used_k && a.batch) bad("block_table: needs cache_seqlens, the keys present of each sequence");
        a.block_table = table.as<const int32_t>();
        a.table_batch = table.stride[0];
        a.page_size = k.shape[1];
        max_pages = table.shape[1];
    } else if (!packed_k && cache_batch_idx.is_none() && k.shape[0] != a.batch) {
        bad("k: batch " + to_string(k.shape[0]) + ", expected " + to_string(a.batch));
    }
    if (const std::optional<Tensor> t = maybe_tensor(alibi_slopes, "alibi_slopes")) {
        expect_dtype(*t, "alibi_slopes", DType::f32);
        const int last = t->ndim - 1;
        if (t->ndim < 1 || t->ndim > 2 || t->shape[last] != a.heads ||
            (t->ndim == 2 && t->shape[0] != a.batch))
            bad("alibi_slopes: shape " + shape_text(*t) + ", expected (heads,) or (batch, heads)");
        if (a.heads > 1 && t->stride[last] != 1) bad("alibi_slopes: the last dimension is not contiguous");
        a.alibi = t->as<const float>();
        a.alibi_batch = t->ndim == 2 ? t->stride[0] : 0;
    }
    if (const std::optional<Tensor> t = maybe_tensor(attn_mask, "attn_mask")) {
        if (t->dtype != DType::boolean && t->dtype != DType::f32 && t->dtype != q.dtype)
            bad(std::string("attn_mask: ") + dtype_name(t->dtype) + ", expected bool, float32 or q's " +
                dtype_name(q.dtype));
        if (packed_q || packed_k) bad("attn_mask: needs dense q and k");
        const int64_t columns = paged ? max_pages * a.page_size : a.k_len;
        if (t->ndim != 4 || t->shape[0] != a.batch || t->shape[1] != a.heads || t->shape[2] != a.q_len ||
            t->shape[3] != columns)
            bad("attn_mask: shape " + shape_text(*t) + ", expected (batch, heads, Sq, Sk)");
        a.mask = t->data;
        a.mask_dtype = t->dtype;
        a.mask_batch = t->stride[0], a.mask_head = t->stride[1], a.mask_q = t->stride[2],
        a.mask_k = t->stride[3];
    }
    if (const std::optional<Tensor> t = maybe_tensor(lse_, "lse")) {
        expect_dtype(*t, "lse", DType::f32);
        expect_dims(*t, "lse", packed_q ? 2 : 3);
        const int last = t->ndim - 1;
        if (t->shape[last] != q.shape[qs] || t->shape[last - 1] != a.heads ||
            (!packed_q && t->shape[0] != a.batch))
            bad("lse: shape " + shape_text(*t) + ", expected ([batch,] heads, queries)");
        if (t->shape[last] > 1 && t->stride[last] != 1) bad("lse: the last dimension is not contiguous");
        a.lse = t->as<float>();
        a.lse_head = t->stride[last - 1];
        a.lse_batch = packed_q ? 0 : t->stride[0];
    }
    a.scale = float(scale);
    a.softcap = float(softcap);
    a.left = bound(left);
    a.right = bound(right);
    check_lengths(a, packed_q ? q.shape[0] : 0, packed_k ? k.shape[0] : 0, k.shape[0], max_pages);
    if (a.batch == 0 || a.heads == 0) return;

    threads = usable_threads(threads);
    const KernelTable& table = kernels();
    void* memory = workspace(table.attention_workspace(a, threads));
    Running running(threads);
    table.attention(a, threads, memory);
}

}  // namespace

void bind_attention(py::module_& m) {
    using py::arg;
    m.def(
        "attention", attention, arg("q"), arg("k"), arg("v"), arg("out"), arg("lse"), arg("scale"),
        arg("softcap"), arg("left"), arg("right"), arg("alibi_slopes"), arg("sinks"), arg("attn_mask"),
        arg("cu_seqlens_q"), arg("cu_seqlens_k"), arg("block_table"), arg("seqused_k"),
        arg("cache_batch_idx"), arg("cache_leftpad"), arg("q_pos0"), arg("k_pos0"), arg("k_scale"),
        arg("v_scale"), arg("threads"),
        "softmax(q k^T) v into `out` (and `lse` unless None); the fields of spec.AttentionArgs, window sides "
        "None for unbounded. Raises ValueError naming the argument before anything out of bounds would be "
        "read.");
}

}  // namespace fastattn

// kernels.attention: checks what a kernel would otherwise read out of bounds, then runs it.
#include <algorithm>
#include <utility>

#include "checks.hpp"

namespace fastattn {

namespace {

using std::string;
using std::to_string;

// A contiguous vector of n elements; null for None.
template <class T>
const T* vector(py::handle object, const char* name, DType dtype, int64_t n) {
    const std::optional<Tensor> t = maybe_tensor(object, name);
    if (!t) return nullptr;
    expect_dtype(*t, name, {dtype});
    expect_shape(*t, name, {n});
    expect_contiguous(*t, name);
    return t->as<const T>();
}

// A side of the window; -1: unbounded. Cut far beyond any position, so that no sum with it overflows.
int64_t bound(const py::handle& side) {
    constexpr int64_t widest = int64_t(1) << 40;
    const int64_t value = side.is_none() ? -1 : side.cast<int64_t>();
    return value < widest ? value : widest;
}

// One call: tensors become pointers and strides of `args`, each checked against those before it.
class AttentionCall {
public:
    AttentionArgs args = {};

    AttentionCall(bool packed_q, bool packed_k, bool paged)
        : packed_q_(packed_q), packed_k_(packed_k), paged_(paged) {}

    void tensors(py::handle q_object, py::handle k_object, py::handle v_object, py::handle out_object) {
        const Tensor q = rows(q_object, "q", packed_q_), k = rows(k_object, "k", packed_k_);
        const Tensor v = rows(v_object, "v", packed_k_), out = rows(out_object, "out", packed_q_);
        expect_float(q, "q");
        for (const auto& [t, name] : {std::pair(&k, "k"), {&v, "v"}, {&out, "out"}})
            expect_dtype(*t, name, {q.dtype});
        args.dtype = q.dtype;
        args.q = q.data, args.k = k.data, args.v = v.data, args.out = out.data;
        args.heads = q.shape[q.ndim - 2], args.head_dim = q.shape[q.ndim - 1];
        args.kv_heads = k.shape[k.ndim - 2], args.v_head_dim = v.shape[v.ndim - 1];
        if (args.head_dim < 1 || args.v_head_dim < 1) throw bad("head_dim", "0", "at least 1");
        if (args.kv_heads < 1 || args.heads % args.kv_heads)
            throw bad("k", to_string(args.kv_heads) + " heads", "a divisor of q's " + to_string(args.heads));
        if (k.shape[k.ndim - 1] != args.head_dim)
            throw bad("k", "head_dim " + to_string(k.shape[k.ndim - 1]), "q's " + to_string(args.head_dim));
        expect_rows_of(k, v, "v");
        expect_rows_of(q, out, "out");
        strides(q, args.q_batch, args.q_seq, args.q_head);
        strides(k, args.k_batch, args.k_seq, args.k_head);
        strides(v, args.v_batch, args.v_seq, args.v_head);
        strides(out, args.out_batch, args.out_seq, args.out_head);
        queries_ = q.shape[q.ndim - 3];
        cache_rows_ = k.shape[0];
        args.q_len = packed_q_ ? 0 : queries_;
        args.k_len = packed_k_ || paged_ ? 0 : k.shape[1];
        args.page_size = paged_ ? k.shape[1] : 0;
        args.batch = q.shape[0];  // packed: `lengths` knows
    }

    void lengths(py::handle cu_seqlens_q, py::handle cu_seqlens_k, py::handle seqused_k,
                 py::handle cache_batch_idx, py::handle cache_leftpad, py::handle q_pos0, py::handle k_pos0) {
        if (packed_q_) {
            const Tensor cu = tensor(cu_seqlens_q, "cu_seqlens_q");
            expect_dims(cu, "cu_seqlens_q", 1);
            if (cu.shape[0] < 1) throw bad("cu_seqlens_q", "empty", "batch + 1 values");
            args.batch = cu.shape[0] - 1;
        }
        args.cu_q = vector<int32_t>(cu_seqlens_q, "cu_seqlens_q", DType::i32, args.batch + 1);
        if (packed_k_) args.cu_k = vector<int32_t>(cu_seqlens_k, "cu_seqlens_k", DType::i32, args.batch + 1);
        args.used_k = vector<int32_t>(seqused_k, "cache_seqlens", DType::i32, args.batch);
        args.batch_idx = vector<int32_t>(cache_batch_idx, "cache_batch_idx", DType::i32, args.batch);
        args.leftpad = vector<int32_t>(cache_leftpad, "cache_leftpad", DType::i32, args.batch);
        args.q_pos0 = vector<int32_t>(q_pos0, "q_pos0", DType::i32, args.batch);
        args.k_pos0 = vector<int32_t>(k_pos0, "k_pos0", DType::i32, args.batch);
        if (!packed_k_ && !paged_ && !args.batch_idx && cache_rows_ != args.batch)
            throw bad("k", "batch " + to_string(cache_rows_), to_string(args.batch));
    }

    void pages(py::handle block_table) {
        if (!paged_) return;
        const Tensor table = tensor(block_table, "block_table");
        expect_dims(table, "block_table", 2);
        expect_dtype(table, "block_table", {DType::i32});
        expect_shape(table, "block_table", {args.batch, table.shape[1]});
        expect_rows(table, "block_table");
        if (!args.used_k && args.batch)
            throw bad("cache_seqlens", "None", "the keys present of each sequence, with block_table");
        args.block_table = table.as<const int32_t>();
        args.table_batch = table.stride[0];
        max_pages_ = table.shape[1];
    }

    void scores(py::handle alibi_slopes, py::handle sinks, py::handle k_scale, py::handle v_scale) {
        args.sinks = vector<float>(sinks, "sinks", DType::f32, args.heads);
        args.k_scale = vector<float>(k_scale, "k_scale", DType::f32, args.kv_heads);
        args.v_scale = vector<float>(v_scale, "v_scale", DType::f32, args.kv_heads);
        const std::optional<Tensor> t = maybe_tensor(alibi_slopes, "alibi_slopes");
        if (!t) return;
        expect_dtype(*t, "alibi_slopes", {DType::f32});
        expect_rows(*t, "alibi_slopes");
        if (t->ndim == 2)
            expect_shape(*t, "alibi_slopes", {args.batch, args.heads});
        else
            expect_shape(*t, "alibi_slopes", {args.heads});
        args.alibi = t->as<const float>();
        args.alibi_batch = t->ndim == 2 ? t->stride[0] : 0;
    }

    void mask(py::handle attn_mask) {
        const std::optional<Tensor> t = maybe_tensor(attn_mask, "attn_mask");
        if (!t) return;
        expect_dtype(*t, "attn_mask", {DType::boolean, DType::f32, args.dtype});
        if (packed_q_ || packed_k_) throw bad("attn_mask", "given with packed sequences", "dense q and k");
        expect_shape(*t, "attn_mask",
                     {args.batch, args.heads, args.q_len, paged_ ? max_pages_ * args.page_size : args.k_len});
        args.mask = t->data;
        args.mask_dtype = t->dtype;
        args.mask_batch = t->stride[0], args.mask_head = t->stride[1];
        args.mask_q = t->stride[2], args.mask_k = t->stride[3];
    }

    void lse(py::handle object) {
        const std::optional<Tensor> t = maybe_tensor(object, "lse");
        if (!t) return;
        expect_dtype(*t, "lse", {DType::f32});
        if (packed_q_)
            expect_shape(*t, "lse", {args.heads, queries_});
        else
            expect_shape(*t, "lse", {args.batch, args.heads, queries_});
        expect_rows(*t, "lse");
        args.lse = t->as<float>();
        args.lse_head = t->stride[t->ndim - 2];
        args.lse_batch = packed_q_ ? 0 : t->stride[0];
    }

    void run(int threads) const {
        check_lengths(args, packed_q_ ? queries_ : 0, packed_k_ ? cache_rows_ : 0, cache_rows_, max_pages_);
        if (args.batch == 0 || args.heads == 0) return;
        threads = usable_threads(threads);
        const KernelTable& table = kernels();
        void* memory = workspace(table.attention_workspace(args, threads));
        Running running(threads);
        table.attention(args, threads, memory);
    }

private:
    static Tensor rows(py::handle object, const char* name, bool packed) {
        const Tensor t = tensor(object, name);
        expect_dims(t, name, packed ? 3 : 4);
        expect_rows(t, name);
        return t;
    }

    // `t` has as many rows and heads as `like`.
    static void expect_rows_of(const Tensor& like, const Tensor& t, const char* name) {
        int64_t shape[MAX_DIM];
        std::copy(like.shape, like.shape + like.ndim, shape);
        shape[like.ndim - 1] = t.shape[t.ndim - 1];
        expect_shape(t, name, shape, like.ndim);
    }

    static void strides(const Tensor& t, int64_t& batch, int64_t& seq, int64_t& head) {
        batch = t.ndim == 4 ? t.stride[0] : 0;
        seq = t.stride[t.ndim - 3];
        head = t.stride[t.ndim - 2];
    }

    bool packed_q_, packed_k_, paged_;
    int64_t queries_ = 0;     // of all packed sequences, or of each
    int64_t cache_rows_ = 0;  // packed keys, cache rows, or pages
    int64_t max_pages_ = 0;
};

void attention(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse, double scale,
               double softcap, py::handle left, py::handle right, py::handle alibi_slopes, py::handle sinks,
               py::handle attn_mask, py::handle cu_seqlens_q, py::handle cu_seqlens_k, py::handle block_table,
               py::handle seqused_k, py::handle cache_batch_idx, py::handle cache_leftpad, py::handle q_pos0,
               py::handle k_pos0, py::handle k_scale, py::handle v_scale, int threads) {
    const bool paged = !block_table.is_none();
    AttentionCall call(!cu_seqlens_q.is_none(), !cu_seqlens_k.is_none() && !paged, paged);
    call.tensors(q, k, v, out);
    call.lengths(cu_seqlens_q, cu_seqlens_k, seqused_k, cache_batch_idx, cache_leftpad, q_pos0, k_pos0);
    call.pages(block_table);
    call.scores(alibi_slopes, sinks, k_scale, v_scale);
    call.mask(attn_mask);
    call.lse(lse);
    call.args.scale = float(scale);
    call.args.softcap = float(softcap);
    call.args.left = bound(left);
    call.args.right = bound(right);
    call.run(threads);
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

// kernels.Decoder: the weights of a decoder, checked once; kernels.DecoderStep: one forward over them.
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <utility>

#include "checks.hpp"
#include "decoder.hpp"
#include "on_shared_memory.hpp"

namespace fastattn {

namespace {

using std::string;
using std::to_string;

// (weight, eps) | None
using Norm = std::optional<std::pair<py::object, float>>;
// (format, codes, scales, mins, g_idx, group_size, group_offset, columns, bias, act_int8, x_perm)
using Weight = std::tuple<string, py::object, py::object, py::object, py::object, int64_t, int64_t, int64_t,
                          py::object, bool, py::object>;

DType float_named(const string& name) {
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
        if (name == dtype_name(dtype)) return dtype;
    throw bad("dtype", "'" + name + "'", "float32, float16 or bfloat16");
}

class Decoder {
public:
    Decoder(const string& dtype, int64_t hidden, int64_t heads, int64_t kv_heads, int64_t head_dim,
            bool interleaved, float scale, int64_t vocabulary, int64_t first_token, const Weight& embedding,
            const Norm& norm) {
        if (hidden < 1 || head_dim < 1) throw bad("hidden, head_dim", "zero", "at least 1");
        if (kv_heads < 1 || heads < 1 || heads % kv_heads)
            throw bad("kv_heads", to_string(kv_heads), "a divisor of " + to_string(heads) + " heads");
        args_.dtype = float_named(dtype);
        args_.hidden = hidden;
        args_.heads = heads, args_.kv_heads = kv_heads, args_.head_dim = head_dim;
        args_.interleaved = interleaved;
        args_.scale = scale;
        const Matrix table = matrix_of(embedding, hidden, "embedding");
        if (table.x_perm) throw bad("embedding", "x_perm", "columns in their own order");
        args_.embedding = table.args.w;
        if (first_token < 0 || first_token + table.args.w.out > vocabulary)
            throw bad("first_token", to_string(first_token), "rows within the vocabulary");
        args_.vocabulary = vocabulary, args_.first_token = first_token;
        args_.norm = norm_of(norm, hidden, "norm");
        if (!args_.norm.weight) throw bad("norm", "None", "a weight");
    }

    void add_block(const Norm& norm, const std::vector<Weight>& qkv, const Norm& q_norm, const Norm& k_norm,
                   const Weight& o, int64_t left, const Norm& mlp_norm, const std::vector<Weight>& gate_up,
                   const Weight& down) {
        AttentionWeights a = {norm_of(norm, args_.hidden, "norm"),
                              norm_of(q_norm, args_.head_dim, "q_norm"),
                              norm_of(k_norm, args_.head_dim, "k_norm"),
                              columns_of(qkv, args_.hidden, "qkv"),
                              matrix_of(o, args_.heads * args_.head_dim, "o"),
                              left};
        MlpWeights m = {
            norm_of(mlp_norm, args_.hidden, "mlp_norm"), columns_of(gate_up, args_.hidden, "gate_up"), {}};
        if (a.qkv.width != args_.qkv_width())
            throw bad("qkv", to_string(a.qkv.width) + " rows", to_string(args_.qkv_width()));
        if (m.gate_up.width % 2) throw bad("gate_up", to_string(m.gate_up.width) + " rows", "an even number");
        if (!a.norm.weight || !m.norm.weight) throw bad("norm, mlp_norm", "None", "weights");
        m.down = matrix_of(down, m.gate_up.width / 2, "down");
        for (const auto& [matrix, name] : {std::pair{&a.o, "o"}, std::pair{&m.down, "down"}}) {
            if (matrix->args.w.out != args_.hidden)
                throw bad(name, to_string(matrix->args.w.out) + " rows", to_string(args_.hidden));
            if (matrix->args.bias) throw bad(name, "a bias", "none: it belongs after the sum over ranks");
        }
        args_.attention.push_back(std::move(a));
        args_.mlp.push_back(std::move(m));
    }

    void set_head(const Weight& head) {
        const Matrix m = matrix_of(head, args_.hidden, "head");
        if (!m.args.w.out) throw bad("head", "no rows", "one a token");
        args_.head = m;
    }

    const DecoderArgs& args() const { return args_; }

private:
    NormWeight norm_of(const Norm& norm, int64_t width, const char* name) {
        if (!norm) return {};
        const Tensor weight = tensor(norm->first, name);
        expect_shape(weight, name, {width});
        expect_dtype(weight, name, {args_.dtype, DType::f32});
        expect_contiguous(weight, name);
        kept_.append(norm->first);
        return {weight.data, weight.dtype, norm->second};
    }

    Matrix matrix_of(const Weight& m, int64_t columns, const char* name) {
        const auto& [format, codes, scales, mins, g_idx, group_size, group_offset, in, bias, act_int8,
                     x_perm] = m;
        if (in != columns) throw bad(name, to_string(in) + " columns", to_string(columns));
        LinearArgs a = {};
        a.w = weight_of(format.c_str(), codes, scales, mins, g_idx, in, group_size, group_offset);
        add_bias(a, bias);
        a.act_int8 = act_int8;
        const int64_t* order = nullptr;
        if (!x_perm.is_none()) {
            const Tensor t = tensor(x_perm, "x_perm");
            check_indices(t, "x_perm", in, 0, in);
            order = t.as<int64_t>();
        }
        for (const py::object& t : {codes, scales, mins, g_idx, bias, x_perm}) kept_.append(t);
        return {a, order};
    }

    ColumnWeights columns_of(const std::vector<Weight>& parts, int64_t columns, const char* name) {
        ColumnWeights w;
        for (const Weight& m : parts) {
            w.parts.push_back(matrix_of(m, columns, name));
            w.width += w.parts.back().args.w.out;
        }
        return w;
    }

    DecoderArgs args_ = {};
    py::list kept_;  // the tensors whose memory args_ points into
};

class DecoderStep {
public:
    DecoderStep(std::shared_ptr<const Decoder> decoder, py::object keys_, py::object values_,
                py::object block_table_, py::object seqused_, py::object cu_seqlens_, py::object positions_,
                py::object slots_, py::object cos_, py::object sin_)
        : decoder_(std::move(decoder)),
          kept_(py::make_tuple(keys_, values_, block_table_, seqused_, cu_seqlens_, positions_, slots_, cos_,
                               sin_)) {
        const DecoderArgs& d = decoder_->args();
        if (d.attention.empty()) throw bad("decoder", "no blocks", "at least one");
        const Tensor keys = tensor(keys_, "keys"), values = tensor(values_, "values");
        const Tensor table = tensor(block_table_, "block_table"), used = tensor(seqused_, "seqused");
        const Tensor cu = tensor(cu_seqlens_, "cu_seqlens"), positions = tensor(positions_, "positions");
        const Tensor slots = tensor(slots_, "slots"), cos = tensor(cos_, "cos"), sin = tensor(sin_, "sin");
        args_.keys = side(keys, "keys", d);
        args_.values = side(values, "values", d);
        args_.page_size = keys.shape[2];
        const int64_t pages = keys.shape[1];
        expect_shape(values, "values", {keys.shape[0], pages, keys.shape[2], d.kv_heads, d.head_dim});

        expect_dims(cu, "cu_seqlens", 1);
        if (cu.shape[0] < 1) throw bad("cu_seqlens", "empty", "batch + 1 values");
        args_.batch = cu.shape[0] - 1;
        expect_dims(positions, "positions", 1);
        args_.rows = positions.shape[0];
        expect_shape(used, "seqused", {args_.batch});
        expect_dims(table, "block_table", 2);
        expect_shape(table, "block_table", {args_.batch, table.shape[1]});
        expect_rows(table, "block_table");
        for (const auto& [t, name] :
             {std::pair{&cu, "cu_seqlens"}, std::pair{&used, "seqused"}, std::pair{&table, "block_table"}})
            expect_dtype(*t, name, {DType::i32});
        for (const auto& [t, name] : {std::pair{&cu, "cu_seqlens"}, std::pair{&used, "seqused"}})
            expect_contiguous(*t, name);
        args_.cu_seqlens = cu.as<int32_t>();
        args_.seqused = used.as<int32_t>();
        args_.block_table = table.as<int32_t>();
        args_.table_stride = table.stride[0];

        expect_dims(cos, "cos", 2);
        expect_shape(sin, "sin", {cos.shape[0], cos.shape[1]});
        for (const auto& [t, name] : {std::pair{&cos, "cos"}, std::pair{&sin, "sin"}}) {
            expect_dtype(*t, name, {DType::f32});
            expect_rows(*t, name);
        }
        args_.half = cos.shape[1];
        if (2 * args_.half > d.head_dim)
            throw bad("cos", to_string(args_.half) + " angles", "at most half of head_dim");
        check_indices(positions, "positions", args_.rows, 0, cos.shape[0]);
        check_indices(slots, "slots", args_.rows, INT64_MIN, pages * args_.page_size);
        args_.positions = positions.as<int64_t>();
        args_.slots = slots.as<int64_t>();
        args_.cos = cos.as<float>(), args_.sin = sin.as<float>();
        args_.cos_stride = cos.stride[0], args_.sin_stride = sin.stride[0];

        AttentionArgs lengths = {};
        lengths.batch = args_.batch;
        lengths.cu_q = args_.cu_seqlens;
        lengths.used_k = args_.seqused;
        lengths.block_table = args_.block_table;
        lengths.table_batch = args_.table_stride;
        lengths.page_size = args_.page_size;
        check_lengths(lengths, args_.rows, 0, pages, table.shape[1]);
        if (args_.cu_seqlens[args_.batch] != args_.rows)
            throw bad("cu_seqlens", "last value " + to_string(args_.cu_seqlens[args_.batch]),
                      to_string(args_.rows) + ", the number of positions");
    }

    void attention(size_t layer, py::object hidden, py::object out, int threads) const {
        half(&DecoderRun::attention_half, layer, hidden, out, threads);
    }
    void mlp(size_t layer, py::object hidden, py::object out, int threads) const {
        half(&DecoderRun::mlp_half, layer, hidden, out, threads);
    }
    // Where `memory` is given, its ranks share the sums; `overdue` as `OnSharedMemory` calls it.
    void forward(py::object ids_, py::object out_, int threads, SharedMemory* memory,
                 const py::object& overdue) const {
        const Tensor ids = tensor(ids_, "ids"), out = tensor(out_, "out");
        check_indices(ids, "ids", args_.rows, 0, tokens(memory));
        rows(out, "out");
        OnSharedMemory ranks(memory, overdue);
        const auto body = [&](const DecoderRun& r) { r.forward(ids.as<int64_t>(), out.data); };
        run(threads, body, false, memory ? &ranks : nullptr);
    }
    void next_tokens(py::object ids_, py::object next_, int threads, SharedMemory* memory,
                     const py::object& overdue) const {
        const DecoderArgs& d = decoder_->args();
        const Tensor ids = tensor(ids_, "ids"), next = tensor(next_, "next");
        check_indices(ids, "ids", args_.rows, 0, tokens(memory));
        expect_shape(next, "next", {args_.rows});
        expect_dtype(next, "next", {DType::i64});
        expect_contiguous(next, "next");
        if (!d.head.args.w.out) throw bad("decoder", "no head", "set_head before");
        OnSharedMemory ranks(memory, overdue);
        const auto body = [&](const DecoderRun& r) { r.next_tokens(ids.as<int64_t>(), next.as<int64_t>()); };
        run(threads, body, true, memory ? &ranks : nullptr);
    }

private:
    // That ids may name: all of them where the ranks' embeddings are added.
    int64_t tokens(const SharedMemory* memory) const {
        const DecoderArgs& d = decoder_->args();
        return memory ? d.vocabulary : d.embedding.out;
    }

    CacheSide side(const Tensor& t, const char* name, const DecoderArgs& d) const {
        expect_dims(t, name, 5);
        expect_shape(t, name, {int64_t(d.attention.size()), t.shape[1], t.shape[2], d.kv_heads, d.head_dim});
        expect_dtype(t, name, {d.dtype});
        expect_rows(t, name);
        const int64_t item = d.dtype == DType::f32 ? 4 : 2;
        return {t.as<char>(), t.stride[0] * item, t.stride[1], t.stride[2], t.stride[3]};
    }

    const void* rows(const Tensor& t, const char* name) const {
        const DecoderArgs& d = decoder_->args();
        expect_shape(t, name, {args_.rows, d.hidden});
        expect_dtype(t, name, {d.dtype});
        expect_contiguous(t, name);
        return t.data;
    }

    void half(void (DecoderRun::*body)(size_t, const void*, void*) const, size_t layer, py::object hidden_,
              py::object out_, int threads) const {
        const size_t layers = decoder_->args().attention.size();
        if (layer >= layers) throw bad("layer", to_string(layer), "below " + to_string(layers));
        const Tensor hidden = tensor(hidden_, "hidden"), out = tensor(out_, "out");
        const void* x = rows(hidden, "hidden");
        rows(out, "out");
        run(threads, [&](const DecoderRun& r) { (r.*body)(layer, x, out.data); });
    }

    template <class Body>
    void run(int threads, const Body& body, bool logits = false, Ranks* ranks = nullptr) const {
        if (!args_.rows) return;
        threads = usable_threads(threads);
        DecoderRun r(decoder_->args(), args_, kernels(), threads, logits, ranks);
        r.use(workspace(r.workspace()));
        Running running(threads);
        body(r);
    }

    std::shared_ptr<const Decoder> decoder_;
    py::tuple kept_;  // the tensors whose memory args_ points into
    StepArgs args_ = {};
};

}  // namespace

void bind_decoder(py::module_& m) {
    using py::arg;
    py::class_<Decoder, std::shared_ptr<Decoder>>(m, "Decoder",
                                                  "Weights of a Llama-family decoder, checked once.")
        .def(py::init<const string&, int64_t, int64_t, int64_t, int64_t, bool, float, int64_t, int64_t,
                      const Weight&, const Norm&>(),
             arg("dtype"), arg("hidden"), arg("heads"), arg("kv_heads"), arg("head_dim"), arg("interleaved"),
             arg("scale"), arg("vocabulary"), arg("first_token"), arg("embedding"), arg("norm"))
        .def("add_block", &Decoder::add_block, arg("norm"), arg("qkv"), arg("q_norm"), arg("k_norm"),
             arg("o"), arg("left"), arg("mlp_norm"), arg("gate_up"), arg("down"))
        .def("set_head", &Decoder::set_head, arg("head"));
    py::class_<DecoderStep>(m, "DecoderStep", "One forward of packed rows over a paged KV cache.")
        .def(py::init<std::shared_ptr<Decoder>, py::object, py::object, py::object, py::object, py::object,
                      py::object, py::object, py::object, py::object>(),
             arg("decoder"), arg("keys"), arg("values"), arg("block_table"), arg("seqused"),
             arg("cu_seqlens"), arg("positions"), arg("slots"), arg("cos"), arg("sin"))
        .def("attention", &DecoderStep::attention, arg("layer"), arg("hidden"), arg("out"), arg("threads"))
        .def("mlp", &DecoderStep::mlp, arg("layer"), arg("hidden"), arg("out"), arg("threads"))
        .def("forward", &DecoderStep::forward, arg("ids"), arg("out"), arg("threads"),
             arg("memory") = py::none(), arg("overdue") = py::none())
        .def("next_tokens", &DecoderStep::next_tokens, arg("ids"), arg("next"), arg("threads"),
             arg("memory") = py::none(), arg("overdue") = py::none());
}

}  // namespace fastattn

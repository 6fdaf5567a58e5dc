// Python functions of linear layers: every shape, dtype and index is checked here.
#include <algorithm>

#include "checks.hpp"
#include "linear_call.hpp"

namespace fastattn {

namespace {

using std::string;
using std::to_string;

}  // namespace

WeightArgs weight_of(const char* format, py::object codes_, py::object scales_, py::object mins_,
                     py::object g_idx_, int64_t in, int64_t group_size, int64_t group_offset) {
    const string kind = format;
    const Tensor codes = tensor(codes_, kind == "dense" ? "weight" : "codes");
    WeightArgs w = {};
    expect_dims(codes, "codes", 2);
    expect_rows(codes, "codes");
    w.codes = codes.data;
    w.dtype = codes.dtype;
    w.out = codes.shape[0];
    w.in = in;
    w.code_stride = codes.stride[0];
    if (kind == "dense") {
        w.kind = WeightKind::dense;
        expect_float(codes, "weight");
        expect_shape(codes, "weight", {w.out, in});
        return w;
    }
    if (kind == "int4") {
        w.kind = WeightKind::int4;
        expect_dtype(codes, "codes", {DType::u8});
        if (in % 32) throw bad("in", to_string(in), "a multiple of 32 for int4");
        expect_shape(codes, "codes", {w.out, in / 2});
    } else if (kind == "int8") {
        w.kind = WeightKind::int8;
        expect_dtype(codes, "codes", {DType::i8});
        expect_shape(codes, "codes", {w.out, in});
    } else {
        throw bad("format", "'" + kind + "'", "dense, int4 or int8");
    }
    if (scales_.is_none()) throw bad("scales", "missing", "a tensor for " + kind);
    const Tensor scales = tensor(scales_, "scales");
    expect_dims(scales, "scales", 2);
    expect_dtype(scales, "scales", {DType::f32, DType::f16});
    expect_rows(scales, "scales");
    w.scales = scales.data;
    w.scale_dtype = scales.dtype;
    w.scale_stride = scales.stride[0];
    w.groups = scales.shape[1];
    w.group_size = group_size;
    w.group_offset = group_offset;
    if (!g_idx_.is_none()) {
        const Tensor g_idx = tensor(g_idx_, "g_idx");
        expect_shape(g_idx, "g_idx", {in});
        expect_dtype(g_idx, "g_idx", {DType::i32});
        expect_contiguous(g_idx, "g_idx");
        w.g_idx = g_idx.as<int32_t>();
        for (int64_t i = 0; i < in; i++)
            if (w.g_idx[i] < 0 || w.g_idx[i] >= w.groups)
                throw bad("g_idx", "value " + to_string(w.g_idx[i]), "0 to " + to_string(w.groups - 1));
        expect_shape(scales, "scales", {w.out, w.groups});
    } else {
        if (group_size < 16 || group_size % 16)
            throw bad("group_size", to_string(group_size), "a multiple of 16");
        if (group_offset < 0 || group_offset >= group_size)
            throw bad("group_offset", to_string(group_offset), "0 to " + to_string(group_size - 1));
        expect_shape(scales, "scales",
                     {w.out, in ? (in + group_offset + group_size - 1) / group_size : w.groups});
    }
    if (!mins_.is_none()) {
        const Tensor mins = tensor(mins_, "mins");
        expect_shape(mins, "mins", {w.out, w.groups});
        expect_dtype(mins, "mins", {scales.dtype});
        expect_rows(mins, "mins");
        w.mins = mins.data;
        w.min_stride = mins.stride[0];
    } else if (w.kind == WeightKind::int4) {
        throw bad("mins", "missing", "a tensor for int4");
    }
    return w;
}

void add_bias(LinearArgs& a, py::object bias_) {
    if (bias_.is_none()) return;
    const Tensor bias = tensor(bias_, "bias");
    expect_shape(bias, "bias", {a.w.out});
    expect_float(bias, "bias");
    expect_contiguous(bias, "bias");
    a.bias = bias.data;
    a.bias_dtype = bias.dtype;
}

namespace {

LinearArgs linear_of(py::object x_, py::object out_, const char* format, py::object codes, py::object scales,
                     py::object mins, py::object g_idx, int64_t group_size, int64_t group_offset,
                     py::object bias, const char* act) {
    const Tensor x = tensor(x_, "x"), out = tensor(out_, "out");
    expect_dims(x, "x", 2);
    expect_float(x, "x");
    expect_rows(x, "x");
    LinearArgs a = {};
    a.w = weight_of(format, codes, scales, mins, g_idx, x.shape[1], group_size, group_offset);
    a.rows = x.shape[0];
    expect_shape(out, "out", {a.rows, a.w.out});
    expect_dtype(out, "out", {x.dtype});
    expect_contiguous(out, "out");
    a.x = x.data;
    a.x_stride = x.stride[0];
    a.out = out.data;
    a.dtype = x.dtype;
    add_bias(a, bias);
    a.act_int8 = string(act) == "int8";
    if (!a.act_int8 && *act) throw bad("act", "'" + string(act) + "'", "'' or 'int8'");
    return a;
}

void linear(py::object x, py::object out, const char* format, py::object codes, py::object scales,
            py::object mins, py::object g_idx, int64_t group_size, int64_t group_offset, py::object bias,
            const char* act, int threads) {
    const LinearArgs a =
        linear_of(x, out, format, codes, scales, mins, g_idx, group_size, group_offset, bias, act);
    threads = threads_for(a.w.out * a.w.in, CHEAP, threads);
    void* scratch = workspace(kernels().ops.linear_workspace(a, threads));
    Running running(threads);
    kernels().ops.linear(a, threads, scratch);
}

// The same for many rows of x.
void gemm(py::object x, py::object out, const char* format, py::object codes, py::object scales,
          py::object mins, py::object g_idx, int64_t group_size, int64_t group_offset, py::object bias,
          const char* act, int threads) {
    const LinearArgs a =
        linear_of(x, out, format, codes, scales, mins, g_idx, group_size, group_offset, bias, act);
    threads = threads_for(a.rows * a.w.out * a.w.in, CHEAP, threads);
    void* scratch = workspace(kernels().ops.gemm_workspace(a, threads));
    Running running(threads);
    kernels().ops.gemm(a, threads, scratch);
}

void dequantize(py::object out_, const char* format, py::object codes, py::object scales, py::object mins,
                py::object g_idx, int64_t group_size, int64_t group_offset, py::object rows_, int threads) {
    const Tensor out = tensor(out_, "out");
    expect_dims(out, "out", 2);
    expect_float(out, "out");
    expect_contiguous(out, "out");
    DequantizeArgs a = {};
    a.w = weight_of(format, codes, scales, mins, g_idx, out.shape[1], group_size, group_offset);
    a.n = a.w.out;
    if (!rows_.is_none()) {
        const Tensor rows = tensor(rows_, "ids");
        a.n = rows.ndim == 1 ? rows.shape[0] : 0;
        check_indices(rows, "ids", a.n, 0, a.w.out);
        a.rows = rows.as<int64_t>();
    }
    expect_shape(out, "out", {a.n, a.w.in});
    a.out = out.data;
    a.dtype = out.dtype;
    threads = threads_for(elements(out), CHEAP, threads);
    void* scratch = workspace(kernels().ops.dequantize_workspace(a, threads));
    Running running(threads);
    kernels().ops.dequantize(a, threads, scratch);
}

// The tensors of a weight as ops.linear passes them: a list, and their names with commas between.
struct Named {
    py::object codes = py::none(), scales = py::none(), mins = py::none();

    Named(const py::list& tensors, const string& names) {
        size_t at = 0;
        for (const py::handle t : tensors) {
            const size_t end = std::min(names.find(',', at), names.size());
            const string name = at > names.size() ? "" : names.substr(at, end - at);
            of(name) = py::reinterpret_borrow<py::object>(t);
            at = end + 1;
        }
        if (codes.is_none() || at <= names.size())
            throw bad("names", "'" + names + "'", "one for each tensor");
    }

private:
    py::object& of(const string& name) {
        if (name == "codes" || name == "weight") return codes;
        if (name == "scales") return scales;
        if (name == "mins") return mins;
        throw bad("names", "'" + name + "'", "codes, scales, mins or weight, for each tensor one");
    }
};

py::object rows_contiguous(const py::object& t) {
    const Tensor x = tensor(t, "x");
    const bool ready = x.ndim != 2 || x.stride[1] == 1 || x.shape[1] <= 1;
    return ready ? t : t.attr("contiguous")();
}

// The whole op, and its result: as little as possible happens in Python, whose data the weights of a model
// push out of the caches between two calls.
py::object linear_op(py::object x_, const py::list& tensors, const string& names, const char* format,
                     int64_t outputs, int64_t group_size, int64_t group_offset, py::object g_idx,
                     py::object x_perm_, py::object bias, const char* act, int threads) {
    const Named w(tensors, names);
    const py::object x = rows_contiguous(x_);
    if (!bias.is_none()) bias = bias.attr("contiguous")();
    const py::object rows = x.attr("shape")[py::int_(0)];
    const py::object out = x.attr("new_empty")(py::make_tuple(rows, outputs));
    const LinearArgs a =
        linear_of(x, out, format, w.codes, w.scales, w.mins, g_idx, group_size, group_offset, bias, act);
    const int64_t* order = nullptr;
    if (!x_perm_.is_none()) {
        const Tensor x_perm = tensor(x_perm_, "x_perm");
        check_indices(x_perm, "x_perm", a.w.in, 0, a.w.in);
        order = x_perm.as<int64_t>();
    }
    const LinearCall call(a, order, kernels(), threads);
    void* scratch = workspace(call.workspace());
    {
        Running running(call.threads());  // without Python's lock, which `out` needs again
        call.run(scratch);
    }
    return out;
}

}  // namespace

void bind_linear(py::module_& m) {
    m.def("linear", linear);
    m.def("gemm", gemm);
    m.def("linear_op", linear_op);
    m.def("dequantize", dequantize);
}

}  // namespace fastattn

// Python functions of the small ops and of linear: every shape, dtype and index is checked here.
#include "checks.hpp"

#include <utility>

namespace fastattn {

namespace {

using std::string;
using std::to_string;

// (outer, inner, width) of a tensor of 1 to 3 dimensions.
void split_rows(const Tensor& t, const char* name, Rows& rows, int64_t* outer, int64_t* inner) {
    if (t.ndim < 1 || t.ndim > 3) throw bad(name, to_string(t.ndim) + " dimensions", "1 to 3");
    expect_rows(t, name);
    *outer = t.ndim == 3 ? t.shape[0] : 1;
    *inner = t.ndim >= 2 ? t.shape[t.ndim - 2] : 1;
    rows = {t.data, t.dtype, t.ndim == 3 ? t.stride[0] : 0, t.ndim >= 2 ? t.stride[t.ndim - 2] : 0};
}

void rms_norm(py::object x_, py::object weight_, py::object residual_, py::object out_, py::object total_,
              float eps, int threads) {
    const Tensor x = tensor(x_, "x"), weight = tensor(weight_, "weight"), out = tensor(out_, "out");
    RmsNormArgs a = {};
    expect_float(x, "x");
    split_rows(x, "x", a.x, &a.outer, &a.inner);
    a.width = x.shape[x.ndim - 1];
    a.eps = eps;
    expect_shape(weight, "weight", {a.width});
    expect_dtype(weight, "weight", {x.dtype, DType::f32});
    expect_contiguous(weight, "weight");
    if (out.dtype != x.dtype || elements(out) != elements(x))
        throw bad("out", "another size or dtype", "x's");
    expect_contiguous(out, "out");
    a.weight = weight.data;
    a.weight_dtype = weight.dtype;
    a.out = out.data;
    if (!residual_.is_none()) {
        const Tensor r = tensor(residual_, "residual"), total = tensor(total_, "total");
        int64_t outer, inner;
        split_rows(r, "residual", a.residual, &outer, &inner);
        if (outer != a.outer || inner != a.inner || r.shape[r.ndim - 1] != a.width)
            throw bad("residual", "shape " + shape_text(r.shape, r.ndim), shape_text(x.shape, x.ndim));
        expect_dtype(r, "residual", {x.dtype, DType::f32});
        if (total.dtype != x.dtype || elements(total) != elements(x))
            throw bad("total", "another size or dtype", "x's");
        expect_contiguous(total, "total");
        a.total = total.data;
    }
    threads = threads_for(elements(x), CHEAP, threads);
    Running running(threads);
    kernels().ops.rms_norm(a, threads);
}

void swiglu(py::object x_, py::object out_, int threads) {
    const Tensor x = tensor(x_, "x"), out = tensor(out_, "out");
    expect_float(x, "x");
    expect_dims(x, "x", 2);
    expect_rows(x, "x");
    if (x.shape[1] % 2) throw bad("x", to_string(x.shape[1]) + " columns", "gate and up of equal width");
    const SwigluArgs a = {x.data, out.data, x.dtype, x.shape[0], x.shape[1] / 2, x.stride[0]};
    expect_shape(out, "out", {a.rows, a.width});
    expect_dtype(out, "out", {x.dtype});
    expect_contiguous(out, "out");
    threads = threads_for(a.rows * a.width, COSTLY, threads);
    Running running(threads);
    kernels().ops.swiglu(a, threads);
}

RotaryArgs heads_of(const Tensor& x, const char* name) {
    RotaryArgs a = {};
    expect_dims(x, name, 3);
    expect_float(x, name);
    expect_rows(x, name);
    a.x = {x.data, x.dtype, x.stride[0], x.stride[1]};
    a.n = x.shape[0];
    a.heads = x.shape[1];
    a.dim = x.shape[2];
    return a;
}

void add_angles(RotaryArgs& a, py::object cos_, py::object sin_, py::object positions_, bool interleaved) {
    const Tensor cos = tensor(cos_, "cos"), sin = tensor(sin_, "sin"),
                 positions = tensor(positions_, "positions");
    expect_dims(cos, "cos", 2);
    expect_shape(sin, "sin", {cos.shape[0], cos.shape[1]});
    for (const auto& [t, name] : {std::pair{&cos, "cos"}, std::pair{&sin, "sin"}}) {
        expect_dtype(*t, name, {DType::f32});
        expect_rows(*t, name);
    }
    if (2 * cos.shape[1] > a.dim)
        throw bad("cos", to_string(cos.shape[1]) + " angles", "at most half of head_dim " + to_string(a.dim));
    check_indices(positions, "positions", a.n, 0, cos.shape[0]);
    a.cos = cos.as<float>();
    a.sin = sin.as<float>();
    a.cos_stride = cos.stride[0];
    a.sin_stride = sin.stride[0];
    a.half = cos.shape[1];
    a.positions = positions.as<int64_t>();
    a.interleaved = interleaved;
}

void rotary(py::object x_, py::object cos, py::object sin, py::object positions, bool interleaved,
            py::object out_, int threads) {
    const Tensor x = tensor(x_, "x"), out = tensor(out_, "out");
    RotaryArgs a = heads_of(x, "x");
    add_angles(a, cos, sin, positions, interleaved);
    expect_shape(out, "out", {a.n, a.heads, a.dim});
    expect_dtype(out, "out", {x.dtype});
    expect_contiguous(out, "out");
    a.out = out.data;
    a.out_dtype = out.dtype;
    if (!elements(x)) return;  // memory that may be null
    threads = threads_for(elements(x), CHEAP, threads);
    Running running(threads);
    kernels().ops.rotary(a, threads);
}

void into_cache(RotaryArgs& a, const Tensor& cache, const char* name, const Tensor& slots) {
    expect_dims(cache, name, 4);
    expect_float(cache, name);
    expect_rows(cache, name);
    expect_shape(cache, name, {cache.shape[0], cache.shape[1], a.heads, a.dim});
    a.out = cache.data;
    a.out_dtype = cache.dtype;
    a.slots = slots.as<int64_t>();
    a.page = cache.shape[1];
    a.page_stride = cache.stride[0];
    a.slot_stride = cache.stride[1];
    a.head_stride = cache.stride[2];
}

void append_kv(py::object k_cache_, py::object v_cache_, py::object k_, py::object v_, py::object slots_,
               py::object cos, py::object sin, py::object positions, bool interleaved, int threads) {
    const Tensor k_cache = tensor(k_cache_, "k_cache"), v_cache = tensor(v_cache_, "v_cache");
    const Tensor k = tensor(k_, "k"), v = tensor(v_, "v"), slots = tensor(slots_, "slots");
    RotaryArgs keys = heads_of(k, "k"), values = heads_of(v, "v");
    into_cache(keys, k_cache, "k_cache", slots);
    into_cache(values, v_cache, "v_cache", slots);
    expect_shape(v, "v", {keys.n, keys.heads, values.dim});
    expect_shape(v_cache, "v_cache", {k_cache.shape[0], k_cache.shape[1], keys.heads, values.dim});
    check_indices(slots, "slots", keys.n, INT64_MIN, k_cache.shape[0] * k_cache.shape[1]);
    if (!cos.is_none()) add_angles(keys, cos, sin, positions, interleaved);
    threads = threads_for(elements(k) + elements(v), CHEAP, threads);
    Running running(threads);
    if (keys.dim) kernels().ops.rotary(keys, threads);  // memory without elements may be null
    if (values.dim) kernels().ops.rotary(values, threads);
}

// ------------------------------------------------------------------------------------------- linear
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

}  // namespace

void bind_ops(py::module_& m) {
    m.def("rms_norm", rms_norm);
    m.def("swiglu", swiglu);
    m.def("rotary", rotary);
    m.def("append_kv", append_kv);
    m.def("linear", linear);
    m.def("gemm", gemm);
    m.def("dequantize", dequantize);
}

}  // namespace fastattn

// Python functions of the small ops: every shape, dtype and index is checked here.
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

}  // namespace

void bind_ops(py::module_& m) {
    m.def("rms_norm", rms_norm);
    m.def("swiglu", swiglu);
    m.def("rotary", rotary);
    m.def("append_kv", append_kv);
}

}  // namespace fastattn

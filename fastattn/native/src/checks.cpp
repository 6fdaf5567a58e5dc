#include "checks.hpp"

#include <algorithm>

namespace fastattn {

using std::string;
using std::to_string;

py::value_error bad(const char* name, const string& was, const string& expected) {
    return py::value_error(string(name) + ": " + was + ", expected " + expected);
}

string shape_text(const int64_t* shape, int ndim) {
    string s = "(";
    for (int i = 0; i < ndim; i++) s += (i ? ", " : "") + to_string(shape[i]);
    return s + (ndim == 1 ? ",)" : ")");
}

void expect_shape(const Tensor& t, const char* name, const int64_t* shape, int ndim) {
    if (t.ndim != ndim || !std::equal(shape, shape + ndim, t.shape))
        throw bad(name, "shape " + shape_text(t.shape, t.ndim), shape_text(shape, ndim));
}

void expect_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
    expect_shape(t, name, shape.begin(), int(shape.size()));
}

void expect_dtype(const Tensor& t, const char* name, std::initializer_list<DType> dtypes) {
    string names;
    for (const DType d : dtypes) {
        if (t.dtype == d) return;
        names += (names.empty() ? "" : " or ") + string(dtype_name(d));
    }
    throw bad(name, dtype_name(t.dtype), names);
}

void expect_float(const Tensor& t, const char* name) {
    expect_dtype(t, name, {DType::f32, DType::f16, DType::bf16});
}

void expect_dims(const Tensor& t, const char* name, int ndim) {
    if (t.ndim != ndim) throw bad(name, to_string(t.ndim) + " dimensions", to_string(ndim));
}

// The last dimension must be contiguous: kernels read it as an array.
void expect_rows(const Tensor& t, const char* name) {
    if (t.ndim && t.shape[t.ndim - 1] > 1 && t.stride[t.ndim - 1] != 1)
        throw bad(name, "last stride " + to_string(t.stride[t.ndim - 1]), "1");
}

void expect_contiguous(const Tensor& t, const char* name) {
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; i--) {
        if (t.shape[i] == 0) return;
        if (t.shape[i] != 1 && t.stride[i] != stride) throw bad(name, "strided", "contiguous memory");
        stride *= t.shape[i];
    }
}

int64_t elements(const Tensor& t) {
    int64_t n = 1;
    for (int i = 0; i < t.ndim; i++) n *= t.shape[i];
    return n;
}

void check_indices(const Tensor& t, const char* name, int64_t n, int64_t lowest, int64_t size) {
    expect_shape(t, name, {n});
    expect_dtype(t, name, {DType::i64});
    expect_contiguous(t, name);
    for (int64_t i = 0; i < n; i++) {
        const int64_t v = t.as<int64_t>()[i];
        if (v < lowest || v >= size)
            throw bad(name, "value " + to_string(v) + " at " + to_string(i),
                      lowest < 0 ? "below " + to_string(size) : "0 to " + to_string(size - 1));
    }
}

}  // namespace fastattn

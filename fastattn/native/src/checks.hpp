// What bindings check before a kernel trusts an argument. Every check raises ValueError naming the argument.
#pragma once

#include <initializer_list>
#include <string>

#include "host.hpp"

namespace fastattn {

py::value_error bad(const char* name, const std::string& was, const std::string& expected);
std::string shape_text(const int64_t* shape, int ndim);
int64_t elements(const Tensor& t);

void expect_shape(const Tensor& t, const char* name, const int64_t* shape, int ndim);
void expect_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape);
void expect_dtype(const Tensor& t, const char* name, std::initializer_list<DType> dtypes);
void expect_float(const Tensor& t, const char* name);
void expect_dims(const Tensor& t, const char* name, int ndim);
// The last dimension contiguous: kernels read it as an array.
void expect_rows(const Tensor& t, const char* name);
void expect_contiguous(const Tensor& t, const char* name);
// Lengths, cache rows and pages, read before any kernel trusts them. q_total, k_total: rows of packed input;
// cache_rows: of k, or pages; max_pages: columns of block_table.
void check_lengths(const AttentionArgs& a, int64_t q_total, int64_t k_total, int64_t cache_rows,
                   int64_t max_pages);
// int64 (n,), contiguous, each in [lowest, size).
void check_indices(const Tensor& t, const char* name, int64_t n, int64_t lowest, int64_t size);

// A weight of quant/packed.py from its tensors; `in`: its columns.
WeightArgs weight_of(const char* format, py::object codes, py::object scales, py::object mins,
                     py::object g_idx, int64_t in, int64_t group_size, int64_t group_offset);
// A bias (out,) of any float type, or None.
void add_bias(LinearArgs& a, py::object bias);

}  // namespace fastattn

// The small ops and linear as plain pointers and strides (in elements), validated before a kernel sees
// them, and the function pointers that each instruction set fills.
#pragma once

#include <stddef.h>

#include "common.hpp"

namespace fastattn {

// Rows (outer, inner) of `width` contiguous values.
struct Rows {
    const void* data;
    DType dtype;
    int64_t outer_stride, inner_stride;
};

struct RmsNormArgs {
    Rows x, residual;    // residual.data null: none
    const void* weight;  // of x's dtype or float32
    DType weight_dtype;
    void* out;    // of x's dtype, contiguous
    void* total;  // x + residual, of x's dtype, contiguous
    int64_t outer, inner, width;
    float eps;
};

struct SwigluArgs {
    const void* x;  // (rows, 2 width): gate, up
    void* out;      // (rows, width), contiguous
    DType dtype;
    int64_t rows, width, stride;
};

// Rotates, or only copies and converts, the rows of `x` (n, heads, dim).
struct RotaryArgs {
    Rows x;
    const float* cos;  // null: copy
    const float* sin;
    int64_t cos_stride, sin_stride;
    const int64_t* positions;
    bool interleaved;
    int64_t n, heads, dim, half;
    // Destination of row i: out + i * heads * dim, or the cache's slot slots[i] (negative: skipped).
    void* out;
    DType out_dtype;
    const int64_t* slots;
    int64_t page, page_stride, slot_stride, head_stride;
};

struct GatherArgs {
    const void* x;         // (rows, width), contiguous
    const int64_t* order;  // (width,): column i of out is column order[i] of x
    void* out;             // (rows, width), contiguous
    DType dtype;
    int64_t rows, width;
};

enum class WeightKind : int { dense, int8, int4 };

struct WeightArgs {
    WeightKind kind;
    const void* codes;  // or the dense matrix
    DType dtype;        // of a dense matrix
    int64_t out, in, code_stride;
    const void* scales;
    const void* mins;  // may be null
    DType scale_dtype;
    int64_t groups, scale_stride, min_stride;
    int64_t group_size, group_offset;
    const int32_t* g_idx;  // null: column c is of group (c + group_offset) / group_size
};

struct LinearArgs {
    WeightArgs w;
    const void* x;  // (rows, in), and out (rows, w.out) contiguous of the same dtype
    void* out;
    DType dtype;
    int64_t rows, x_stride;
    const void* bias;  // may be null
    DType bias_dtype;
    bool act_int8;  // x may be rounded to 8 bits, with a scale for each 32 columns
};

struct DequantizeArgs {
    WeightArgs w;
    const int64_t* rows;  // of w, n of them; null: the first n
    int64_t n;
    void* out;  // (n, w.in), contiguous
    DType dtype;
};

struct MxArgs {
    int bits, mantissa_bits, exponent_bits;  // of the element format; INT8: exponent_bits 0
    int bias, emax, max_code;
    int32_t carry_above;  // the scale's exponent grows by 1 when amax's mantissa bits exceed this
    int64_t rows, n, block;
    const void* x;  // packing: (rows, n) contiguous; unpacking: the result
    DType dtype;
    uint8_t* codes;
    uint8_t* scales;
};

struct OpsTable {
    void (*rms_norm)(const RmsNormArgs&, int threads);
    void (*swiglu)(const SwigluArgs&, int threads);
    void (*rotary)(const RotaryArgs&, int threads);
    void (*gather)(const GatherArgs&, int threads);
    size_t (*linear_workspace)(const LinearArgs&, int threads);
    void (*linear)(const LinearArgs&, int threads, void* workspace);
    size_t (*gemm_workspace)(const LinearArgs&, int threads);
    void (*gemm)(const LinearArgs&, int threads, void* workspace);
    size_t (*dequantize_workspace)(const DequantizeArgs&, int threads);
    void (*dequantize)(const DequantizeArgs&, int threads, void* workspace);
    size_t (*mx_workspace)(const MxArgs&, int threads);
    void (*mx_pack)(const MxArgs&, int threads, void* workspace);
    void (*mx_unpack)(const MxArgs&, int threads, void* workspace);
};

}  // namespace fastattn

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
    const void* x;         // (rows, width)
    const int64_t* order;  // (width,): column i of out is column order[i] of x
    void* out;             // (rows, width), contiguous
    DType dtype;
    int64_t rows, width, x_stride;
};

struct ArgmaxArgs {
    const void* x;  // (rows, width), contiguous
    DType dtype;
    int64_t rows, width;
    int64_t* out;  // (rows,)
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
    // The weight that is read after w: each thread fetches the head of its rows while it ends. Null: none is
    // known, and nothing has fetched the head of w.
    const WeightArgs* next;
};

struct DequantizeArgs {
    WeightArgs w;
    const int64_t* rows;  // of w, n of them; null: the first n
    int64_t n;
    void* out;  // (n, w.in), contiguous
    DType dtype;
};

enum class MxScale : int { e8m0, e4m3, fp16 };

// A block format of quant/mx.py.
struct MxFormat {
    int bits, exponent_bits, mantissa_bits;  // of the element; integers: exponent_bits 0
    int bias, emax, max_code;
    MxScale scale;
    int32_t carry_above;  // E8M0: the exponent grows by 1 when amax's mantissa bits exceed this
    int top;              // finer: see FineScale
    int64_t block;
    // To search, or the only one. E8M0: added to the exponent; finer: times amax gives the scale.
    int candidates;
    float candidate[8];
};

// Codes, scales and outlier channels of all rows, each part contiguous.
struct MxMessage {
    uint8_t* codes;
    uint8_t* scales;
    uint8_t* outliers;  // bfloat16, at any address
};

struct MxArgs {
    MxFormat format;
    int64_t rows, n;          // n channels are quantized
    int rotate;               // 0, or a power of two
    const int64_t* outliers;  // ascending channels of n + outlier_count
    int64_t outlier_count;
    DType dtype;
    const void* x;              // encoding: (rows, n + outlier_count), contiguous
    void* out;                  // decoding: the sum, of the same shape
    const MxMessage* messages;  // encoding: one
    int64_t count;
};

// out = the sum of `count` arrays of n values, formed in float32 in their order and rounded once; `out` may
// be one of them.
struct SumArgs {
    const void* const* parts;
    int64_t count, n;
    void* out;
    DType dtype;
};

struct OpsTable {
    void (*rms_norm)(const RmsNormArgs&, int threads);
    void (*swiglu)(const SwigluArgs&, int threads);
    void (*rotary)(const RotaryArgs&, int threads);
    void (*gather)(const GatherArgs&, int threads);
    void (*argmax)(const ArgmaxArgs&);
    void (*sum)(const SumArgs&);
    size_t (*linear_workspace)(const LinearArgs&, int threads);
    void (*linear)(const LinearArgs&, int threads, void* workspace);
    // The same by integer products; false, and nothing is written, where W or x is no matter of integers.
    bool (*integer_linear)(const LinearArgs&, int threads, void* workspace);
    size_t (*gemm_workspace)(const LinearArgs&, int threads);
    void (*gemm)(const LinearArgs&, int threads, void* workspace);
    size_t (*dequantize_workspace)(const DequantizeArgs&, int threads);
    void (*dequantize)(const DequantizeArgs&, int threads, void* workspace);
    size_t (*mx_workspace)(const MxArgs&, int threads);
    void (*mx_encode)(const MxArgs&, int threads, void* workspace);
    void (*mx_decode_sum)(const MxArgs&, int threads, void* workspace);
};

}  // namespace fastattn

// y = x W^T + bias for few rows of x, and the dequantized W for many.
//
// A thread takes a block of W's rows and reads each of their bytes once, whatever the number of x's rows:
// a chunk is decoded into registers and multiplied with that chunk of every row of x, in float32.
#pragma once

#include "ops_dot_linear.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Rows of W in flight at M rows of x: their sums and the decoded chunk stay in registers.
FA_INLINE constexpr int rows_in_flight(int m) {
    if (REGISTERS == 32) return m == 8 ? 2 : 4;
    return m == 8 ? 1 : m == 4 ? 2 : 4;
}
constexpr int MAX_IN_FLIGHT = 4;

template <class Format, int M, int R>
struct Dots {
    static constexpr int CHAINS = M * R < 8 ? 2 : 1;  // independent sums, to cover the latency of fma
    vf sum[R][M][CHAINS];

    FA_INLINE void add(Dots& d, const uint8_t* const* codes, const Row* rows, const int32_t* index, int64_t c,
                       const float* x, int64_t x_stride) {
        for (int r = 0; r < R; r++) {
            vf w[PARTS];
            Format::decode(codes[r], rows[r], index, c, w);
            for (int m = 0; m < M; m++)
                for (int k = 0; k < PARTS; k++) {
                    vf& s = d.sum[r][m][k % CHAINS];
                    s = fma(w[k], load(x + m * x_stride + c * CHUNK + k * W), s);
                }
        }
    }

    // y[r * M + m] = row r of W times row m of x
    static void run(const Row* rows, const int32_t* index, int64_t in, const float* x, int64_t x_stride,
                    float* y) {
        Dots d;
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++)
                for (int i = 0; i < CHAINS; i++) d.sum[r][m][i] = zero();
        const uint8_t* codes[R];
        const int64_t full = in / CHUNK;
        for (int64_t c = 0; c < full; c++) {
            for (int r = 0; r < R; r++) codes[r] = rows[r].codes + c * Format::BYTES;
            add(d, codes, rows, index, c, x, x_stride);
        }
        if (in % CHUNK) {
            alignas(64) uint8_t buffer[R][Format::BYTES];
            for (int r = 0; r < R; r++) codes[r] = chunk_codes<Format>(rows[r], full, in, buffer[r]);
            add(d, codes, rows, index, full, x, x_stride);
        }
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) {
                vf s = d.sum[r][m][0];
                if (CHAINS == 2) s = s + d.sum[r][m][CHAINS - 1];
                y[r * M + m] = reduce_add(s);
            }
    }
};

FA_INLINE float scalar_of(const void* p, DType dtype, int64_t i) {
    if (dtype == DType::f32) return static_cast<const float*>(p)[i];
    if (dtype == DType::f16) return to_float(static_cast<const f16*>(p)[i]);
    return to_float(static_cast<const bf16*>(p)[i]);
}
FA_INLINE void set_scalar(void* p, DType dtype, int64_t i, float y) {
    if (dtype == DType::f32) static_cast<float*>(p)[i] = y;
    if (dtype == DType::f16) static_cast<f16*>(p)[i] = from_float<f16>(y);
    if (dtype == DType::bf16) static_cast<bf16*>(p)[i] = from_float<bf16>(y);
}

// x as float32, each row padded with zeros to whole chunks; x itself where it already is that.
struct Input {
    const float* x;
    int64_t stride;
};
FA_INLINE bool ready(const LinearArgs& a) { return a.dtype == DType::f32 && a.w.in % CHUNK == 0; }

template <class T>
static void pad_rows(const LinearArgs& a, float* x, int64_t stride) {
    for (int64_t m = 0; m < a.rows; m++) {
        widen(static_cast<const T*>(a.x) + m * a.x_stride, a.w.in, x + m * stride);
        for (int64_t i = a.w.in; i < stride; i++) x[m * stride + i] = 0.0f;
    }
}
static Input float_input(const LinearArgs& a, float* scratch) {
    if (ready(a)) return {static_cast<const float*>(a.x), a.x_stride};
    const int64_t stride = chunks_of(a.w.in) * CHUNK;
    if (a.dtype == DType::f32) pad_rows<float>(a, scratch, stride);
    if (a.dtype == DType::f16) pad_rows<f16>(a, scratch, stride);
    if (a.dtype == DType::bf16) pad_rows<bf16>(a, scratch, stride);
    return {scratch, stride};
}

// Workspace: x, the group index, then each thread's scales.
struct Workspace {
    size_t x, index, scales;  // bytes
    size_t total(int threads) const { return x + index + size_t(threads) * scales; }
};
static Workspace layout(const LinearArgs& a) {
    const size_t x = ready(a) ? 0 : size_t(a.rows * chunks_of(a.w.in) * CHUNK) * sizeof(float);
    const size_t index = a.w.kind == WeightKind::dense ? 0 : size_t(index_length(a.w)) * sizeof(int32_t);
    return {aligned(x), aligned(index), aligned(size_t(MAX_IN_FLIGHT * scale_floats(a.w)) * sizeof(float))};
}
static size_t linear_workspace(const LinearArgs& a, int threads) {
    const size_t floats = layout(a).total(threads), dots = dot_workspace(a, threads);
    return floats > dots ? floats : dots;
}

template <class Format>
struct LinearRows {
    const LinearArgs& a;
    Input in;
    const int32_t* index;

    template <int M, int R>
    void multiply(const Row* rows, int64_t o, int64_t m) const {
        float y[M * R];
        Dots<Format, M, R>::run(rows, index, a.w.in, in.x + m * in.stride, in.stride, y);
        for (int r = 0; r < R; r++) {
            const float b = a.bias ? scalar_of(a.bias, a.bias_dtype, o + r) : 0.0f;
            for (int i = 0; i < M; i++)
                set_scalar(a.out, a.dtype, (m + i) * a.w.out + o + r, y[r * M + i] + b);
        }
    }
    // `n` <= MAX_IN_FLIGHT rows of W from o, M rows of x from m.
    template <int M>
    void multiply_rows(const Row* rows, int64_t o, int n, int64_t m) const {
        constexpr int R = rows_in_flight(M) < Format::MAX_ROWS ? rows_in_flight(M) : Format::MAX_ROWS;
        int r = 0;
        for (; r + R <= n; r += R) multiply<M, R>(rows + r, o + r, m);
        if (R > 1)
            for (; r < n; r++) multiply<M, 1>(rows + r, o + r, m);
    }
    void run(int64_t lo, int64_t hi, float* scratch) const {
        for (int64_t o = lo; o < hi; o += MAX_IN_FLIGHT) {
            const int n = hi - o < MAX_IN_FLIGHT ? int(hi - o) : MAX_IN_FLIGHT;
            Row rows[MAX_IN_FLIGHT];
            for (int r = 0; r < n; r++) rows[r] = open_row(a.w, o + r, scratch + r * scale_floats(a.w));
            int64_t m = 0;
            for (; m + 8 <= a.rows; m += 8) multiply_rows<8>(rows, o, n, m);
            if (a.rows - m >= 4) multiply_rows<4>(rows, o, n, m), m += 4;
            if (a.rows - m >= 2) multiply_rows<2>(rows, o, n, m), m += 2;
            if (a.rows - m >= 1) multiply_rows<1>(rows, o, n, m);
        }
    }
};

struct RunLinear {
    const LinearArgs& a;
    int threads;
    char* workspace;

    template <class Format>
    void run() const {
        const Workspace parts = layout(a);
        int32_t* index = reinterpret_cast<int32_t*>(workspace + parts.x);
        if (parts.index) fill_index(a.w, index);
        const LinearRows<Format> rows = {a, float_input(a, reinterpret_cast<float*>(workspace)), index};
        char* scales = workspace + parts.x + parts.index;
        // Blocks of about 64 KB of W, so that a slow thread takes fewer.
        const int64_t bytes = chunks_of(a.w.in) * Format::BYTES + 1;
        const int64_t block = (65536 / bytes / MAX_IN_FLIGHT + 1) * MAX_IN_FLIGHT;
        parallel_for((a.w.out + block - 1) / block, threads, [&](int64_t item, int thread) {
            const int64_t lo = item * block, hi = lo + block < a.w.out ? lo + block : a.w.out;
            rows.run(lo, hi, reinterpret_cast<float*>(scales + size_t(thread) * parts.scales));
        });
    }
};

static void linear(const LinearArgs& a, int threads, void* workspace) {
    if (dot_linear(a, threads, workspace)) return;
    with_format(a.w, RunLinear{a, threads, static_cast<char*>(workspace)});
}

// Workspace: the group index, then each thread's scales.
static size_t dequantize_scales(const DequantizeArgs& a) {
    return aligned(size_t(scale_floats(a.w)) * sizeof(float));
}
static size_t dequantize_index(const DequantizeArgs& a) {
    return a.w.kind == WeightKind::dense ? 0 : aligned(size_t(index_length(a.w)) * sizeof(int32_t));
}
static size_t dequantize_workspace(const DequantizeArgs& a, int threads) {
    return dequantize_index(a) + size_t(threads) * dequantize_scales(a);
}

template <class Format, class T>
static void dequantize_row(const Row& row, const int32_t* index, int64_t in, T* out) {
    vf w[PARTS];
    const int64_t full = in / CHUNK;
    for (int64_t c = 0; c < full; c++) {
        Format::decode(row.codes + c * Format::BYTES, row, index, c, w);
        for (int k = 0; k < PARTS; k++) store(out + c * CHUNK + k * W, w[k]);
    }
    if (const int rest = int(in % CHUNK)) {
        alignas(64) uint8_t buffer[Format::BYTES];
        T values[CHUNK];
        Format::decode(chunk_codes<Format>(row, full, in, buffer), row, index, full, w);
        for (int k = 0; k < PARTS; k++) store(values + k * W, w[k]);
        memcpy(out + full * CHUNK, values, size_t(rest) * sizeof(T));
    }
}

struct RunDequantize {
    const DequantizeArgs& a;
    int threads;
    char* workspace;

    template <class Format>
    void run() const {
        int32_t* index = reinterpret_cast<int32_t*>(workspace);
        if (dequantize_index(a)) fill_index(a.w, index);
        parallel_ranges(a.n, 1, threads, [&](int64_t lo, int64_t hi, int thread) {
            char* scales = workspace + dequantize_index(a) + size_t(thread) * dequantize_scales(a);
            for (int64_t i = lo; i < hi; i++) {
                const Row row = open_row(a.w, a.rows ? a.rows[i] : i, reinterpret_cast<float*>(scales));
                const int64_t at = i * a.w.in;
                if (a.dtype == DType::f32)
                    dequantize_row<Format>(row, index, a.w.in, static_cast<float*>(a.out) + at);
                else if (a.dtype == DType::f16)
                    dequantize_row<Format>(row, index, a.w.in, static_cast<f16*>(a.out) + at);
                else
                    dequantize_row<Format>(row, index, a.w.in, static_cast<bf16*>(a.out) + at);
            }
        });
    }
};

static void dequantize(const DequantizeArgs& a, int threads, void* workspace) {
    with_format(a.w, RunDequantize{a, threads, static_cast<char*>(workspace)});
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

// RMSNorm with an optional residual, and SwiGLU.
#pragma once

#include "ops_table.hpp"
#include "parallel.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

template <class T>
FA_INLINE const T* row_of(const Rows& r, int64_t outer, int64_t inner) {
    return static_cast<const T*>(r.data) + outer * r.outer_stride + inner * r.inner_stride;
}

struct none {};

// One row; X: x, out and total; V: weight; R: residual.
template <class X, class V, class R>
struct RmsNorm {
    static void row(const X* x, const R* residual, const V* weight, X* out, X* total, int64_t width,
                    float eps) {
        vf sum[4] = {zero(), zero(), zero(), zero()};
        int64_t i = 0;
        for (; i + 4 * W <= width; i += 4 * W)
            for (int k = 0; k < 4; k++) {
                const vf s = add(x + i + k * W, residual + i + k * W, total + i + k * W);
                sum[k] = fma(s, s, sum[k]);
            }
        for (; i + W <= width; i += W) {
            const vf s = add(x + i, residual + i, total + i);
            sum[0] = fma(s, s, sum[0]);
        }
        if (const int n = int(width - i)) {
            const vf t = load_n(x + i, n) + load_n(residual + i, n);
            store_n(total + i, t, n);
            const vf s = load_n(total + i, n);
            sum[1] = fma(s, s, sum[1]);
        }
        RmsNorm<X, V, none>::scale(total, weight, out, width, (sum[0] + sum[1]) + (sum[2] + sum[3]), eps);
    }
    // The sum, rounded to X, is what is kept and what is normalised.
    FA_INLINE vf add(const X* x, const R* residual, X* total) {
        store(total, load(x) + load(residual));
        return load(total);
    }
};

template <class X, class V>
struct RmsNorm<X, V, none> {
    static void row(const X* x, const none*, const V* weight, X* out, X*, int64_t width, float eps) {
        vf sum[4] = {zero(), zero(), zero(), zero()};
        int64_t i = 0;
        for (; i + 4 * W <= width; i += 4 * W)
            for (int k = 0; k < 4; k++) {
                const vf s = load(x + i + k * W);
                sum[k] = fma(s, s, sum[k]);
            }
        for (; i + W <= width; i += W) {
            const vf s = load(x + i);
            sum[0] = fma(s, s, sum[0]);
        }
        if (const int n = int(width - i)) {
            const vf s = load_n(x + i, n);
            sum[1] = fma(s, s, sum[1]);
        }
        scale(x, weight, out, width, (sum[0] + sum[1]) + (sum[2] + sum[3]), eps);
    }
    static void scale(const X* x, const V* weight, X* out, int64_t width, vf sum, float eps) {
        const vf factor = set1(1.0f / __builtin_sqrtf(reduce_add(sum) / float(width) + eps));
        int64_t i = 0;
        for (; i + W <= width; i += W) store(out + i, load(x + i) * factor * load(weight + i));
        if (const int n = int(width - i))
            store_n(out + i, load_n(x + i, n) * factor * load_n(weight + i, n), n);
    }
};

template <class X, class V, class R>
static void rms_norm_rows(const RmsNormArgs& a, int threads) {
    parallel_ranges(a.outer * a.inner, 1, threads, [&](int64_t lo, int64_t hi, int) {
        for (int64_t i = lo; i < hi; i++) {
            const int64_t o = i / a.inner, n = i % a.inner;
            X* total = a.total ? static_cast<X*>(a.total) + i * a.width : nullptr;
            RmsNorm<X, V, R>::row(row_of<X>(a.x, o, n), row_of<R>(a.residual, o, n),
                                  static_cast<const V*>(a.weight), static_cast<X*>(a.out) + i * a.width,
                                  total, a.width, a.eps);
        }
    });
}

template <class X, class V>
static void rms_norm_residual(const RmsNormArgs& a, int threads) {
    if (!a.residual.data) return rms_norm_rows<X, V, none>(a, threads);
    if (a.residual.dtype == DType::f32) return rms_norm_rows<X, V, float>(a, threads);
    rms_norm_rows<X, V, X>(a, threads);
}

template <class X>
static void rms_norm_weight(const RmsNormArgs& a, int threads) {
    if (a.weight_dtype == DType::f32) return rms_norm_residual<X, float>(a, threads);
    rms_norm_residual<X, X>(a, threads);
}

static void rms_norm(const RmsNormArgs& a, int threads) {
    if (a.x.dtype == DType::f32) return rms_norm_weight<float>(a, threads);
    if (a.x.dtype == DType::f16) return rms_norm_weight<f16>(a, threads);
    rms_norm_weight<bf16>(a, threads);
}

template <class T>
static void swiglu_rows(const SwigluArgs& a, int threads) {
    parallel_ranges(a.rows, 1, threads, [&](int64_t lo, int64_t hi, int) {
        for (int64_t r = lo; r < hi; r++) {
            const T* gate = static_cast<const T*>(a.x) + r * a.stride;
            const T* up = gate + a.width;
            T* out = static_cast<T*>(a.out) + r * a.width;
            int64_t i = 0;
            for (; i + W <= a.width; i += W) {
                const vf g = load(gate + i);
                store(out + i, g * sigmoid(g) * load(up + i));
            }
            if (const int n = int(a.width - i)) {
                const vf g = load_n(gate + i, n);
                store_n(out + i, g * sigmoid(g) * load_n(up + i, n), n);
            }
        }
    });
}

static void swiglu(const SwigluArgs& a, int threads) {
    if (a.dtype == DType::f32) return swiglu_rows<float>(a, threads);
    if (a.dtype == DType::f16) return swiglu_rows<f16>(a, threads);
    swiglu_rows<bf16>(a, threads);
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

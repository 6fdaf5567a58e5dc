// Rotary embedding, and the KV append, which is the same with a cache slot as the destination.
#pragma once

#include "ops_table.hpp"
#include "parallel.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

template <class T, class U>
FA_INLINE void copy_row(const T* x, U* out, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, load(x + i));
    if (const int rest = int(n - i)) store_n(out + i, load_n(x + i, rest), rest);
}
template <class T>
FA_INLINE void copy_row(const T* x, T* out, int64_t n) {
    memcpy(out, x, size_t(n) * sizeof(T));
}

// Pairs (i, i + half).
template <class T, class U>
FA_INLINE void rotate_halves(const T* x, U* out, const float* cos, const float* sin, int64_t half) {
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        const vf u = load(x + i), v = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(out + i, fnma(v, s, u * c));
        store(out + half + i, fma(u, s, v * c));
    }
    if (const int n = int(half - i)) {
        const vf u = load_n(x + i, n), v = load_n(x + half + i, n);
        const vf c = load_n(cos + i, n), s = load_n(sin + i, n);
        store_n(out + i, fnma(v, s, u * c), n);
        store_n(out + half + i, fma(u, s, v * c), n);
    }
}

// Pairs (2 i, 2 i + 1), in pieces through float buffers; the compiler vectorizes the middle loop.
template <class T, class U>
FA_INLINE void rotate_pairs(const T* x, U* out, const float* cos, const float* sin, int64_t half) {
    constexpr int PIECE = 64;
    float in[2 * PIECE], turned[2 * PIECE];
    for (int64_t start = 0; start < half; start += PIECE) {
        const int64_t n = half - start < PIECE ? half - start : int64_t(PIECE);
        copy_row(x + 2 * start, in, 2 * n);
        for (int64_t i = 0; i < n; i++) {
            const float c = cos[start + i], s = sin[start + i], u = in[2 * i], v = in[2 * i + 1];
            turned[2 * i] = u * c - v * s;
            turned[2 * i + 1] = u * s + v * c;
        }
        copy_row(turned, out + 2 * start, 2 * n);
    }
}

template <class T, class U>
static void rotary_rows(const RotaryArgs& a, int threads) {
    parallel_ranges(a.n, 1, threads, [&](int64_t lo, int64_t hi, int) {
        for (int64_t n = lo; n < hi; n++) {
            U* row = static_cast<U*>(a.out);
            int64_t head_stride = a.dim;
            if (a.slots) {
                if (a.slots[n] < 0) continue;
                row += a.slots[n] / a.page * a.page_stride + a.slots[n] % a.page * a.slot_stride;
                head_stride = a.head_stride;
            } else {
                row += n * a.heads * a.dim;
            }
            const float *cos = nullptr, *sin = nullptr;
            if (a.cos) {
                cos = a.cos + a.positions[n] * a.cos_stride;
                sin = a.sin + a.positions[n] * a.sin_stride;
            }
            for (int64_t h = 0; h < a.heads; h++) {
                const T* x = static_cast<const T*>(a.x.data) + n * a.x.outer_stride + h * a.x.inner_stride;
                U* out = row + h * head_stride;
                if (!cos)
                    copy_row(x, out, a.dim);
                else {
                    if (a.interleaved)
                        rotate_pairs(x, out, cos, sin, a.half);
                    else
                        rotate_halves(x, out, cos, sin, a.half);
                    copy_row(x + 2 * a.half, out + 2 * a.half, a.dim - 2 * a.half);
                }
            }
        }
    });
}

template <class T>
static void rotary_to(const RotaryArgs& a, int threads) {
    if (a.out_dtype == DType::f32) return rotary_rows<T, float>(a, threads);
    if (a.out_dtype == DType::f16) return rotary_rows<T, f16>(a, threads);
    rotary_rows<T, bf16>(a, threads);
}

static void rotary(const RotaryArgs& a, int threads) {
    if (a.x.dtype == DType::f32) return rotary_to<float>(a, threads);
    if (a.x.dtype == DType::f16) return rotary_to<f16>(a, threads);
    rotary_to<bf16>(a, threads);
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

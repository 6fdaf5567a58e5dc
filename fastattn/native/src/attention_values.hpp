// Weighted sums of value rows, read straight from the cache.
#pragma once

#include "attention_gemm.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int DECODE_KEYS = 64;  // of a step, at most: the stride of its scores and probabilities

// Columns accumulate in an order that suits the instructions: restore() puts
// STEP * W of them back.
template <class Units>
struct Values;

template <>
struct Values<FloatUnits> {
    static constexpr int COLUMNS = W;
    FA_INLINE void restore(float*) {}

    // acc[r][v] += sum over keys j of p[r][j] * columns of rows[j]; `each` runs once a row.
    template <int R, int V, class T, class Each>
    FA_INLINE void add(const float* p, const T* const* rows, int64_t c, int64_t n, int64_t columns,
                       vf (&acc)[R][V], const Each& each) {
        for (int64_t j = 0; j < n; j++) {
            each();
            vf x[V];
            const T* from = rows[j] + c;
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) x[v] = FloatUnits::load_row(from + v * W, V > 1 ? W : columns);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const vf weight = set1(p[r * DECODE_KEYS + j]);
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) acc[r][v] = fma(weight, x[v], acc[r][v]);
            }
        }
    }
};

#if defined(__AVX512BF16__)
// Pairs of rows are interleaved within 128-bit lanes: of 32 columns, the first vector accumulates
// 0-3, 8-11, 16-19, 24-27 and the second one the others.
template <>
struct Values<Bf16Units> {
    static constexpr int COLUMNS = 2 * W;
    FA_INLINE void restore(float* p) {
        float t[2 * W];
        memcpy(t, p, sizeof(t));
        for (int i = 0; i < 4; i++) {
            memcpy(p + 8 * i, t + 4 * i, 16);
            memcpy(p + 8 * i + 4, t + W + 4 * i, 16);
        }
    }

    template <int R, int V, class Each>
    FA_INLINE void add(const bf16* p, const bf16* const* rows, int64_t c, int64_t n, int64_t columns,
                       vf (&acc)[R][V], const Each& each) {
        for (int64_t j = 0; j < n; j += 2) {
            each();
            each();
            __m512i x[V];
#pragma GCC unroll 4
            for (int v = 0; v < V / 2; v++) {
                const int64_t here = V > 2 ? 2 * W : columns;
                const __m512i even = Bf16Units::load_row(rows[j] + c + v * 2 * W, here);
                const __m512i odd = j + 1 < n ? Bf16Units::load_row(rows[j + 1] + c + v * 2 * W, here)
                                              : _mm512_setzero_si512();
                x[2 * v] = _mm512_unpacklo_epi16(even, odd);
                x[2 * v + 1] = _mm512_unpackhi_epi16(even, odd);
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const __m512i weight =
                    Bf16Units::spread(reinterpret_cast<const uint32_t*>(p + r * DECODE_KEYS + j));
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) acc[r][v] = Bf16Units::dot(weight, x[v], acc[r][v]);
            }
        }
    }
};
#endif

}  // namespace FASTATTN_ISA
}  // namespace fastattn

// Register-blocked products of packed operands, the inner loops of prefill.
//
// An operand is made of units (simd_units.hpp) along the summed dimension. B is packed in panels: unit k of
// column c of a panel is at b[k * PANEL + c]. A is read at compile-time strides.
#pragma once

#include "attention_sequence.hpp"
#include "simd_units.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int ROWS = REGISTERS == 32 ? 6 : W == 8 ? 6 : 4;  // of a tile of C
constexpr int VECTORS = REGISTERS == 32 ? 4 : 2;            // columns of a tile of C, in vectors
constexpr int PANEL = VECTORS * W;
constexpr int KEYS = 128;      // of a packed block of keys and values
constexpr int64_t CHAIN = 32;  // units summed one after another
static_assert(KEYS % PANEL == 0 && KEYS % 16 == 0, "a block is whole panels");

// Computes in float, from float, f16 or bf16 tensors.
struct FloatUnits : Floats {
    using Probability = float;

    // One row of a query, key or value, W * STEP elements at a time.
    using Stored = float;  // a query kept for reuse
    template <class T>
    FA_INLINE Vector load_row(const T* p, int64_t n) {
        return n >= W ? load(p) : load_n(p, int(n));
    }
    FA_INLINE void store_query(Stored* p, Vector v) { store(p, v); }
    FA_INLINE Vector load_query(const Stored* p) { return load(p); }
};

#if defined(__AVX512BF16__)
// Computes bf16 x bf16 + float, two products an instruction lane; probabilities are rounded to bf16.
struct Bf16Units : Bf16Pairs {
    using Probability = bf16;

    using Stored = bf16;
    FA_INLINE Vector load_row(const bf16* p, int64_t n) {
        return n >= 2 * W ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << n) - 1u, p);
    }
    FA_INLINE void store_query(Stored* p, Vector v) { _mm512_storeu_si512(p, v); }
    FA_INLINE Vector load_query(const Stored* p) { return _mm512_loadu_si512(p); }
};
FA_INLINE void store_p(bf16* p, vf v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v.v)); }
#endif

// C (ROWS x NV vectors, row stride LDC) = A B, or with ACCUMULATE C = alpha * C + A B, alpha one a row.
// Sums of CHAIN units are taken on their own: one long chain of additions would round worse.
template <class Units, int A_ROW, int A_K, int LDC, bool ACCUMULATE, int NV>
static __attribute__((noinline)) void tile_product(const typename Units::Unit* a,
                                                   const typename Units::Unit* b, float* c, int64_t depth,
                                                   const float* alpha) {
    for (int64_t first = 0; first < depth; first += CHAIN) {
        vf acc[ROWS][NV];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) acc[r][v] = zero();
        for (int64_t n = imin(CHAIN, depth - first); n > 0; n--) {
            typename Units::Vector vb[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) vb[v] = Units::load_units(b + v * W);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const typename Units::Vector va = Units::spread(a + r * A_ROW);
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) acc[r][v] = Units::dot(va, vb[v], acc[r][v]);
            }
            a += A_K;
            b += PANEL;
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) {
                float* to = c + r * LDC + v * W;
                if (first > 0)
                    store(to, acc[r][v] + load(to));
                else
                    store(to, ACCUMULATE ? fma(load(to), set1(alpha[r]), acc[r][v]) : acc[r][v]);
            }
        }
    }
}

template <class Units, int A_ROW, int A_K, int LDC, bool ACCUMULATE>
FA_INLINE void tile_product(int vectors, const typename Units::Unit* a, const typename Units::Unit* b,
                            float* c, int64_t depth, const float* alpha) {
    static_assert(VECTORS == 2 || VECTORS == 4, "the cases below");
    if (vectors == VECTORS)
        return tile_product<Units, A_ROW, A_K, LDC, ACCUMULATE, VECTORS>(a, b, c, depth, alpha);
    if (VECTORS == 4 && vectors >= 2) {
        if (vectors == 3)
            return tile_product<Units, A_ROW, A_K, LDC, ACCUMULATE, VECTORS - 1>(a, b, c, depth, alpha);
        return tile_product<Units, A_ROW, A_K, LDC, ACCUMULATE, 2>(a, b, c, depth, alpha);
    }
    return tile_product<Units, A_ROW, A_K, LDC, ACCUMULATE, 1>(a, b, c, depth, alpha);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn

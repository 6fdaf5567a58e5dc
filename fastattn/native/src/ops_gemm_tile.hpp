// The register tile of the GEMM: rows of W, decoded, times vectors of rows of x.
//
// The summed dimension is made of units (simd_units.hpp): one or two columns. The lanes of a vector are rows
// of x, packed in panels [unit][W]; an element of W is spread over them, so that W stays in its own order,
// whatever its format, and needs no transposition.
#pragma once

#include "ops_decode.hpp"
#include "simd_units.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

// Lanes for up to W / 2 rows of x, at half the cost of W. Shorter vectors are used whole.
#if defined(FASTATTN_SIMD_AVX512)
constexpr bool HALVES = true;
struct vh {
    __m256 v;
};
FA_INLINE vh zero_half() { return {_mm256_setzero_ps()}; }
FA_INLINE vh load_half(const float* p) { return {_mm256_loadu_ps(p)}; }
FA_INLINE void store(float* p, vh a) { _mm256_storeu_ps(p, a.v); }
FA_INLINE vh operator+(vh a, vh b) { return {_mm256_add_ps(a.v, b.v)}; }
#else
constexpr bool HALVES = false;
using vh = vf;
FA_INLINE vh zero_half() { return zero(); }
FA_INLINE vh load_half(const float* p) { return load(p); }
#endif

namespace {

constexpr int TILE_ROWS = REGISTERS == 32 ? 12 : 6;  // of W
constexpr int64_t DEPTH = 320;                       // units of a block, at most
// Between decoded rows: an odd number of cache lines, so that rows do not meet in the same sets of L1.
constexpr int64_t DECODED_STRIDE = DEPTH + 16;

struct GemmFloat : Floats {
    static constexpr int64_t CHAIN = 64;  // units summed one after another: a long chain rounds worse
#if defined(FASTATTN_SIMD_AVX512)
    FA_INLINE vh load_half_x(const Unit* p) { return load_half(p); }
    FA_INLINE vh spread_half(const Unit* p) { return {_mm256_set1_ps(*p)}; }
    FA_INLINE vh low_half(Vector w) { return {_mm512_castps512_ps256(w.v)}; }
    FA_INLINE vh dot_half(vh w, vh x, vh c) { return {_mm256_fmadd_ps(w.v, x.v, c.v)}; }
#endif
    // W units of a row of x, of which the first n columns exist.
    template <class T>
    FA_INLINE vf load_row(const T* p, int64_t n) {
        return n >= W ? load(p) : n > 0 ? load_n(p, int(n)) : zero();
    }
    FA_INLINE void store_chunk(Unit* p, const vf* w) {
        for (int k = 0; k < PARTS; k++) store(p + k * W, w[k]);
    }
};

#if defined(__AVX512BF16__)
// bf16 x: W is rounded to bf16, products are exact and summed in float.
struct GemmBf16 : Bf16Pairs {
    static constexpr int64_t CHAIN = DEPTH;  // the result is rounded to bf16 anyway
    FA_INLINE __m256i load_half_x(const Unit* p) { return _mm256_loadu_si256((const __m256i*)p); }
    FA_INLINE __m256i spread_half(const Unit* p) { return _mm256_set1_epi32(int(*p)); }
    FA_INLINE __m256i low_half(Vector w) { return _mm512_castsi512_si256(w); }
    FA_INLINE vh dot_half(__m256i w, __m256i x, vh c) {
        return {_mm256_dpbf16_ps(c.v, (__m256bh)w, (__m256bh)x)};
    }
    FA_INLINE vf load_row(const bf16* p, int64_t n) {
        const __mmask32 inside = n >= 2 * W ? ~0u : n > 0 ? (1u << n) - 1u : 0u;
        return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(inside, p))};
    }
    FA_INLINE void store_chunk(Unit* p, const vf* w) {
        _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(w[1].v, w[0].v));
    }
};
#endif

// c[r * ldc + m] (+)= sum over `depth` units of W's row r times row m of x, for TILE_ROWS rows of W and V
// vectors, and half a one, of rows of x. Panels of x lie `panel` units apart.
template <class Units, int V, bool HALF>
static __attribute__((noinline)) void gemm_tile(const typename Units::Unit* w, const typename Units::Unit* x,
                                                int64_t panel, int64_t depth, bool add, float* c,
                                                int64_t ldc) {
    for (int64_t first = 0; first == 0 || first < depth; first += Units::CHAIN, add = true) {
        const int64_t last = first + Units::CHAIN < depth ? first + Units::CHAIN : depth;
        vf sum[TILE_ROWS][V + 1];
        vh half[TILE_ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < TILE_ROWS; r++) {
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) sum[r][v] = zero();
            half[r] = zero_half();
        }
        for (int64_t k = first; k < last; k++) {
            typename Units::Vector xs[V + 1];
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) xs[v] = Units::load_units(x + v * panel + k * W);
            [[maybe_unused]] const typename Units::Unit* last_x = x + V * panel + k * W;
#pragma GCC unroll 16
            for (int r = 0; r < TILE_ROWS; r++) {
                const typename Units::Unit* from = w + r * DECODED_STRIDE + k;
                if constexpr (V == 0) {
                    half[r] = Units::dot_half(Units::spread_half(from), Units::load_half_x(last_x), half[r]);
                    continue;
                }
                const typename Units::Vector ws = Units::spread(from);
#pragma GCC unroll 2
                for (int v = 0; v < V; v++) sum[r][v] = Units::dot(ws, xs[v], sum[r][v]);
                if constexpr (HALF)
                    half[r] = Units::dot_half(Units::low_half(ws), Units::load_half_x(last_x), half[r]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < TILE_ROWS; r++) {
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) {
                float* to = c + r * ldc + v * W;
                store(to, add ? sum[r][v] + load(to) : sum[r][v]);
            }
            if constexpr (HALF) {
                float* to = c + r * ldc + V * W;
                store(to, add ? half[r] + load_half(to) : half[r]);
            }
        }
    }
}

// The same for any number of rows of x, in the fewest lanes that hold them.
template <class Units>
static void gemm_tiles(const typename Units::Unit* w, const typename Units::Unit* x, int64_t rows,
                       int64_t depth, bool add, float* c, int64_t ldc) {
    const int64_t panel = depth * W;
    for (int64_t m = 0; m < rows; m += 2 * W, x += 2 * panel, c += 2 * W) {
        const int64_t rest = rows - m;
        if constexpr (HALVES) {
            if (rest <= W / 2) return gemm_tile<Units, 0, true>(w, x, panel, depth, add, c, ldc);
            if (rest > W && rest <= W + W / 2)
                return gemm_tile<Units, 1, true>(w, x, panel, depth, add, c, ldc);
        }
        if (rest <= W) return gemm_tile<Units, 1, false>(w, x, panel, depth, add, c, ldc);
        gemm_tile<Units, 2, false>(w, x, panel, depth, add, c, ldc);
    }
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

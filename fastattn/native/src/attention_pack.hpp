// Packing of queries, keys and values into the units and panels of attention_gemm.hpp.
#pragma once

#include "attention_gemm.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

template <class T>
FA_INLINE vf load_up_to(const T* p, int64_t n) {
    return n >= W ? load(p) : n > 0 ? load_n(p, int(n)) : zero();
}

template <class Units>
struct Packer;

template <>
struct Packer<FloatUnits> {
    // Row r of `rows` queries, `depth` floats each, into a[tile][k][ROWS].
    template <class T>
    static void query(const T* row, int64_t head_dim, int64_t r, float* a) {
        float* to = a + (r / ROWS) * head_dim * ROWS + r % ROWS;
        for (int64_t d = 0; d < head_dim; d++) to[d * ROWS] = to_float(row[d]);
    }
    // n keys into panels [panel][k][PANEL]; columns up to the next multiple of W are zeroed.
    template <class T>
    static void keys(const T* const* rows, int64_t n, int64_t head_dim, float* b) {
        for (int64_t j = 0; j < n; j += W) {
            float* panel = b + (j / PANEL) * head_dim * PANEL + j % PANEL;
            const int64_t count = imin(W, n - j);
            for (int64_t d = 0; d < head_dim; d += W) {
                vf block[W];
                for (int i = 0; i < W; i++)
                    block[i] = i < count ? load_up_to(rows[j + i] + d, head_dim - d) : zero();
                transpose(block);
                const int64_t depth = imin(W, head_dim - d);
                for (int64_t i = 0; i < depth; i++) store(panel + (d + i) * PANEL, block[i]);
            }
        }
    }
    // n values into panels [panel][key][PANEL]; rows up to the next multiple of W and odd columns are zeroed.
    template <class T>
    static void values(const T* const* rows, int64_t n, int64_t v_head_dim, float* b) {
        const int64_t padded = round_up(n, W);
        for (int64_t c = 0; c < v_head_dim; c += W) {
            float* to = b + (c / PANEL) * KEYS * PANEL + c % PANEL;
            for (int64_t j = 0; j < n; j++) store(to + j * PANEL, load_up_to(rows[j] + c, v_head_dim - c));
            for (int64_t j = n; j < padded; j++) store(to + j * PANEL, zero());
        }
    }
};

#if defined(__AVX512BF16__)
FA_INLINE __mmask32 first32(int64_t n) { return n >= 32 ? ~0u : n > 0 ? (1u << n) - 1u : 0u; }

template <>
struct Packer<Bf16Units> {
    static void query(const bf16* row, int64_t head_dim, int64_t r, uint32_t* a) {
        const int64_t depth = ceil_div(head_dim, 2);
        uint32_t* to = a + (r / ROWS) * depth * ROWS + r % ROWS;
        for (int64_t d = 0; d < depth; d++) {
            const uint32_t high = 2 * d + 1 < head_dim ? row[2 * d + 1].bits : 0u;
            to[d * ROWS] = row[2 * d].bits | high << 16;
        }
    }
    static void keys(const bf16* const* rows, int64_t n, int64_t head_dim, uint32_t* b) {
        const int64_t depth = ceil_div(head_dim, 2);
        for (int64_t j = 0; j < n; j += W) {
            uint32_t* panel = b + (j / PANEL) * depth * PANEL + j % PANEL;
            const int64_t count = imin(W, n - j);
            for (int64_t d = 0; d < depth; d += W) {
                const __mmask32 inside = first32(head_dim - 2 * d);
                vf block[W];
                for (int i = 0; i < W; i++)
                    block[i].v =
                        _mm512_castsi512_ps(i < count ? _mm512_maskz_loadu_epi16(inside, rows[j + i] + 2 * d)
                                                      : _mm512_setzero_si512());
                transpose(block);
                const int64_t rest = imin(W, depth - d);
                for (int64_t i = 0; i < rest; i++) store((float*)(panel + (d + i) * PANEL), block[i]);
            }
        }
    }
    static void values(const bf16* const* rows, int64_t n, int64_t v_head_dim, uint32_t* b) {
        const int64_t pairs = round_up(n, W) / 2;
        for (int64_t c = 0; c < v_head_dim; c += W) {
            uint32_t* to = b + (c / PANEL) * (KEYS / 2) * PANEL + c % PANEL;
            const __mmask16 inside = __mmask16(first32(imin(W, v_head_dim - c)));
            for (int64_t j = 0; j < pairs; j++) {
                __m256i even = _mm256_setzero_si256(), odd = _mm256_setzero_si256();
                if (2 * j < n) even = _mm256_maskz_loadu_epi16(inside, rows[2 * j] + c);
                if (2 * j + 1 < n) odd = _mm256_maskz_loadu_epi16(inside, rows[2 * j + 1] + c);
                const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
                _mm512_storeu_si512(to + j * PANEL, _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
            }
        }
    }
};
#endif

}  // namespace FASTATTN_ISA
}  // namespace fastattn

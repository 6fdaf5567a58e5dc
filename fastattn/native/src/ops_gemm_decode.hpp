// Decoding of a few rows of W into the units that the GEMM's tile multiplies.
#pragma once

#include "ops_gemm_tile.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// A chunk of a row, as floats rounded to units.
template <class Format, class Units>
struct DecodeChunk {
    FA_INLINE void to(typename Units::Unit* p, const uint8_t* codes, const Row& row, const int32_t* index,
                      int64_t c) {
        vf w[PARTS];
        Format::decode(codes, row, index, c, w);
        Units::store_chunk(p, w);
    }
};

#if defined(__AVX512BF16__)
template <>
struct DecodeChunk<Dense<bf16>, GemmBf16> {
    FA_INLINE void to(uint32_t* p, const uint8_t* codes, const Row&, const int32_t*, int64_t) {
        _mm512_storeu_si512(p, _mm512_loadu_si512(codes));
    }
};

// As Table4, with a table of bf16: half as wide, and rounded before it is looked up.
template <Grouping G>
struct DecodeTable4 {
    FA_INLINE __m256i table(const float* scale) {
        const vf q = {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
        return (__m256i)_mm512_cvtneps_pbh(fma(set1(scale[0]), q, set1(scale[BANK])).v);
    }
    FA_INLINE void to(uint32_t* p, const uint8_t* codes, const Row& row, const int32_t* index, int64_t c) {
        const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)codes));
        const __m256i low = table(row.scales + index[G == HALF_GROUPS ? 2 * c : c]);
        const __m256i high = G == HALF_GROUPS ? table(row.scales + index[2 * c + 1]) : low;
        _mm256_storeu_si256((__m256i*)p, _mm256_permutexvar_epi16(b, low));
        _mm256_storeu_si256((__m256i*)p + 1, _mm256_permutexvar_epi16(_mm256_srli_epi16(b, 4), high));
    }
};
template <>
struct DecodeChunk<Grouped<Int4Codes, CHUNK_GROUPS>, GemmBf16> : DecodeTable4<CHUNK_GROUPS> {};
template <>
struct DecodeChunk<Grouped<Int4Codes, HALF_GROUPS>, GemmBf16> : DecodeTable4<HALF_GROUPS> {};
#endif

// Part of W to decode: chunks [lo, hi) of `n` <= TILE_ROWS rows. The next part that will be asked for lies
// `next_rows` rows and `next_chunks` chunks further.
struct Part {
    const Row* rows;
    int64_t n, lo, hi, next_rows, next_chunks;
};
template <class Units>
using DecodePart = void (*)(const WeightArgs& w, const Part& part, const int32_t* index,
                            typename Units::Unit* to);

// Into rows of DECODED_STRIDE units; rows that W does not have become zeros.
template <class Format, class Units>
static void decode_part(const WeightArgs& w, const Part& part, const int32_t* index,
                        typename Units::Unit* to) {
    using Chunk = DecodeChunk<Format, Units>;
    constexpr int64_t UNITS = CHUNK / Units::STEP;
    const int64_t whole = part.hi * CHUNK <= w.in ? part.hi : w.in / CHUNK;
    const int64_t next = part.next_rows * w.code_stride * code_bytes(w) + part.next_chunks * Format::BYTES;
    for (int64_t r = 0; r < part.n; r++, to += DECODED_STRIDE) {
        const Row& row = part.rows[r];
        typename Units::Unit* p = to;
        for (int64_t c = part.lo; c < whole; c++, p += UNITS) {
            const uint8_t* codes = row.codes + c * Format::BYTES;
            // Only a few lines of a row are read at a time: too short a stream for the processor to foresee.
            __builtin_prefetch(codes + next);
            Chunk::to(p, codes, row, index, c);
        }
        if (whole < part.hi) {
            alignas(64) uint8_t buffer[Format::BYTES];
            Chunk::to(p, chunk_codes<Format>(row, whole, w.in, buffer), row, index, whole);
        }
    }
    for (int64_t r = part.n; r < TILE_ROWS; r++, to += DECODED_STRIDE)
        memset(to, 0, size_t((part.hi - part.lo) * UNITS) * sizeof(*to));
}

template <class Units>
struct ChooseDecoder {
    DecodePart<Units>* chosen;
    template <class Format>
    void run() const {
        *chosen = decode_part<Format, Units>;
    }
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

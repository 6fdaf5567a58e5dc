// Weights as float lanes, 32 columns (a chunk) of one row at a time, for every layout of quant/packed.py.
#pragma once

#include "ops_table.hpp"
#include "parallel.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int CHUNK = 32;
constexpr int PARTS = CHUNK / W;  // vectors of a chunk

FA_INLINE int64_t chunks_of(int64_t columns) { return (columns + CHUNK - 1) / CHUNK; }
FA_INLINE size_t aligned(size_t bytes) { return (bytes + 63) & ~size_t(63); }

// How the columns of a chunk map to groups.
enum Grouping : int {
    CHUNK_GROUPS,   // one group a chunk: index[c]
    HALF_GROUPS,    // one a half: index[2 c], index[2 c + 1]
    COLUMN_GROUPS,  // any: index[column], or ~index at the first column of a half that is of one group
};

FA_INLINE Grouping grouping(const WeightArgs& w) {
    if (w.g_idx || w.group_offset % 16) return COLUMN_GROUPS;
    return w.group_offset % CHUNK == 0 && w.group_size % CHUNK == 0 ? CHUNK_GROUPS : HALF_GROUPS;
}

FA_INLINE int64_t index_length(const WeightArgs& w) {
    const Grouping g = grouping(w);
    return chunks_of(w.in) * (g == CHUNK_GROUPS ? 1 : g == HALF_GROUPS ? 2 : CHUNK);
}

// A row's scales and mins as float32, in banks: 16 scales, then the 16 mins of the same groups, so that one
// pointer and one index reach both.
constexpr int BANK = 16;
FA_INLINE int32_t banked(int64_t group) { return int32_t(group / BANK * 2 * BANK + group % BANK); }
FA_INLINE int64_t scale_floats(const WeightArgs& w) {
    return w.kind == WeightKind::dense ? 0 : (w.groups + BANK - 1) / BANK * 2 * BANK;
}

// Where the scale of each chunk, half or column lies; of the padding past the last column, anywhere valid.
void fill_index(const WeightArgs& w, int32_t* index) {
    const Grouping g = grouping(w);
    const int64_t step = g == CHUNK_GROUPS ? CHUNK : g == HALF_GROUPS ? 16 : 1, n = index_length(w);
    for (int64_t i = 0; i < n; i++) {
        const int64_t column = i * step;
        const int64_t group = column >= w.in ? 0
                              : w.g_idx      ? w.g_idx[column]
                                             : (column + w.group_offset) / w.group_size;
        index[i] = banked(group);
    }
    if (g != COLUMN_GROUPS) return;
    for (int64_t half = 0; half < n; half += 16) {
        int same = 1;
        while (same < 16 && (half + same >= w.in || index[half + same] == index[half])) same++;
        if (same == 16) index[half] = ~index[half];
    }
}

// What a row needs to be decoded.
struct Row {
    const uint8_t* codes;  // bytes of the row, whatever its format
    const float* scales;   // banked
};

FA_INLINE int64_t code_bytes(const WeightArgs& w) {
    if (w.kind == WeightKind::dense) return w.dtype == DType::f32 ? 4 : 2;
    return 1;
}

template <class T>
FA_INLINE void widen(const T* p, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, load(p + i));
    if (const int rest = int(n - i)) store_n(out + i, load_n(p + i, rest), rest);
}

template <class T>
FA_INLINE void fill_banks(const WeightArgs& w, int64_t r, float* out) {
    const T* scales = static_cast<const T*>(w.scales) + r * w.scale_stride;
    const T* mins = static_cast<const T*>(w.mins) + r * w.min_stride;
    for (int64_t g = 0; g < w.groups; g += BANK) {
        const int64_t n = w.groups - g < BANK ? w.groups - g : int64_t(BANK);
        widen(scales + g, n, out + 2 * g);
        if (w.mins)
            widen(mins + g, n, out + 2 * g + BANK);
        else
            for (int i = 0; i < BANK; i += W) store(out + 2 * g + BANK + i, zero());
    }
}

// `scratch`: scale_floats(w) floats that live as long as the result.
FA_INLINE Row open_row(const WeightArgs& w, int64_t r, float* scratch) {
    const Row row = {static_cast<const uint8_t*>(w.codes) + r * w.code_stride * code_bytes(w), scratch};
    if (w.kind == WeightKind::dense) return row;
    if (w.scale_dtype == DType::f16)
        fill_banks<f16>(w, r, scratch);
    else
        fill_banks<float>(w, r, scratch);
    return row;
}

// Float matrices.
template <class T>
struct Dense {
    static constexpr int BYTES = CHUNK * sizeof(T);  // of a chunk
    static constexpr int MAX_ROWS = 4;               // of W in flight
    FA_INLINE void decode(const uint8_t* codes, const Row&, const int32_t*, int64_t, vf* w) {
        for (int k = 0; k < PARTS; k++) w[k] = load(reinterpret_cast<const T*>(codes) + k * W);
    }
};

struct Int8Codes {
    static constexpr int BYTES = CHUNK;
    FA_INLINE void load_q(const uint8_t* codes, vf* q) {
        for (int k = 0; k < PARTS; k++) q[k] = load_i8(reinterpret_cast<const int8_t*>(codes) + k * W);
    }
};

struct Int4Codes {
    static constexpr int BYTES = CHUNK / 2;
    FA_INLINE void load_q(const uint8_t* codes, vf* q) {
        for (int k = 0; k < PARTS / 2; k++) load_nibbles(codes + k * W, q[k], q[k + PARTS / 2]);
    }
};

template <class Codes, Grouping G>
struct Grouped {
    static constexpr int BYTES = Codes::BYTES;
    static constexpr int MAX_ROWS = 4;
    FA_INLINE void decode(const uint8_t* codes, const Row& row, const int32_t* index, int64_t c, vf* w) {
        vf q[PARTS];
        Codes::load_q(codes, q);
        if (G == COLUMN_GROUPS) {
            for (int half = 0; half < 2; half++) {
                const int32_t* columns = index + c * CHUNK + half * 16;
                vf* out = w + half * (PARTS / 2);
                const vf* in = q + half * (PARTS / 2);
                if (*columns < 0) {
                    const float* scale = row.scales + ~*columns;
                    const vf s = set1(scale[0]), m = set1(scale[BANK]);
                    for (int k = 0; k < PARTS / 2; k++) out[k] = fma(s, in[k], m);
                    continue;
                }
#if defined(FASTATTN_SIMD_AVX512)
                const __m512i at = _mm512_loadu_si512(columns);
                const vf s = {_mm512_i32gather_ps(at, row.scales, 4)};
                const vf m = {_mm512_i32gather_ps(at, row.scales + BANK, 4)};
                *out = fma(s, *in, m);
#else
                float s[16], m[16];
                for (int i = 0; i < 16; i++) {
                    const float* scale = row.scales + columns[i];
                    s[i] = scale[0];
                    m[i] = scale[BANK];
                }
                for (int k = 0; k < PARTS / 2; k++) out[k] = fma(load(s + k * W), in[k], load(m + k * W));
#endif
            }
        } else {
            constexpr int SPAN = G == HALF_GROUPS ? PARTS / 2 : PARTS;
            for (int part = 0; part < PARTS; part += SPAN) {
                const float* scale = row.scales + index[c * (PARTS / SPAN) + part / SPAN];
                const vf s = set1(scale[0]), m = set1(scale[BANK]);
                for (int k = part; k < part + SPAN; k++) w[k] = fma(s, q[k], m);
            }
        }
    }
};

#if defined(FASTATTN_SIMD_AVX512)
// A group's 16 possible weights fill one vector, and a nibble looks its weight up: no conversion, no mask.
template <Grouping G>
struct Table4 {
    static constexpr int BYTES = CHUNK / 2;
    static constexpr int MAX_ROWS = 4;
    FA_INLINE void decode(const uint8_t* codes, const Row& row, const int32_t* index, int64_t c, vf* w) {
        const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        const vf q = {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
        const float* scale = row.scales + index[G == HALF_GROUPS ? 2 * c : c];
        vf table = fma(set1(scale[0]), q, set1(scale[BANK]));
        w[0].v = _mm512_permutexvar_ps(b, table.v);
        if (G == HALF_GROUPS) {
            scale = row.scales + index[2 * c + 1];
            table = fma(set1(scale[0]), q, set1(scale[BANK]));
        }
        w[1].v = _mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), table.v);
    }
};
template <>
struct Grouped<Int4Codes, CHUNK_GROUPS> : Table4<CHUNK_GROUPS> {};
template <>
struct Grouped<Int4Codes, HALF_GROUPS> : Table4<HALF_GROUPS> {};
#endif

// Codes of chunk c of a row, through `buffer` where the row ends inside the chunk.
template <class Format>
FA_INLINE const uint8_t* chunk_codes(const Row& row, int64_t c, int64_t in, uint8_t* buffer) {
    const uint8_t* codes = row.codes + c * Format::BYTES;
    const int64_t rest = in - c * CHUNK;
    if (rest >= CHUNK) return codes;
    memset(buffer, 0, Format::BYTES);
    memcpy(buffer, codes, size_t(rest * Format::BYTES / CHUNK));
    return buffer;
}

// Calls body.run<Format>() with the format of `w`.
template <class Codes, class Body>
FA_INLINE void with_grouping(const WeightArgs& w, const Body& body) {
    const Grouping g = grouping(w);
    if (g == CHUNK_GROUPS) return body.template run<Grouped<Codes, CHUNK_GROUPS>>();
    if (g == HALF_GROUPS) return body.template run<Grouped<Codes, HALF_GROUPS>>();
    body.template run<Grouped<Codes, COLUMN_GROUPS>>();
}
template <class Body>
FA_INLINE void with_format(const WeightArgs& w, const Body& body) {
    if (w.kind == WeightKind::int4) return with_grouping<Int4Codes>(w, body);
    if (w.kind == WeightKind::int8) return with_grouping<Int8Codes>(w, body);
    if (w.dtype == DType::f32) return body.template run<Dense<float>>();
    if (w.dtype == DType::f16) return body.template run<Dense<f16>>();
    body.template run<Dense<bf16>>();
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

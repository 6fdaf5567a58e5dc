// Messages of compressed communication (quant/message.py), and with them packing to formats of few bits: one
// pass to encode, one to decode and sum. A row at a time stays in the first-level cache.
#pragma once

#include "mx_bits.hpp"
#include "mx_rotate.hpp"
#include "mx_scale.hpp"
#include "parallel.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// --------------------------------------------------------------------------------------------- encoding
// Sum of the squared errors of a block (ERROR_STEPS in quant/mx.py): integers, exact in any order.
template <bool FLOAT>
FA_INLINE float squared_errors(const MxFormat& f, const float* x, int64_t n, Factor inverse) {
    const float per_unit = 32.0f * power_of_two(f.mantissa_bits - f.emax), rounder = 8388608.0f;  // 2^23
    ilanes sum = {};
    for (int64_t i = 0; i < n; i += W) {
        const lanes scaled = load_lanes(x + i) * inverse.first * inverse.second;
        const ilanes magnitude = (ilanes)scaled & ABS_BITS;
        const lanes error = nearest<FLOAT>(f, magnitude).rounded - (lanes)magnitude;
        const lanes units = (lanes)((ilanes)error & ABS_BITS) * per_unit;
        const lanes capped = units > 127.0f ? lanes{} + 127.0f : units;
        const ilanes d = (ilanes)(capped + rounder) & 0xff;
        sum += keep_first(d * d, n - i);
    }
    int32_t total = 0;
    for (int i = 0; i < W; i++) total += sum[i];
    return float(total);
}

template <bool FLOAT>
FA_INLINE void encode_block(const MxFormat& f, const float* x, int64_t n, uint32_t amax, int k, int64_t block,
                            uint8_t* codes, uint8_t* scales) {
    if (amax >= uint32_t(INF_BITS)) {
        write_scale(f, scales, block, nan_code(f));
        memset(codes, 0, size_t(n));
        return;
    }
    Scale best = candidate_scale(f, amax, k, 0);
    if (f.candidates > 1) {
        float least = squared_errors<FLOAT>(f, x, n, best.inverse) * (best.size * best.size);
        for (int c = 1; c < f.candidates; c++) {
            const Scale scale = candidate_scale(f, amax, k, c);
            const float cost = squared_errors<FLOAT>(f, x, n, scale.inverse) * (scale.size * scale.size);
            if (cost < least) best = scale, least = cost;
        }
    }
    write_scale(f, scales, block, best.code);
    for (int64_t i = 0; i < n; i += W)
        store_codes(codes + i, encode_lanes<FLOAT>(f, load_lanes(x + i) * best.inverse.first * best.inverse.second));
}

// x (n,) to one code a byte, and scales. Both arrays may be written and read W places past n.
template <bool FLOAT>
static void encode_row(const MxFormat& f, const float* x, int64_t n, uint32_t* amax, uint8_t* codes,
                       uint8_t* scales) {
    const int64_t blocks = (n + f.block - 1) / f.block;
    uint32_t largest = 0;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t at = b * f.block, m = n - at < f.block ? n - at : f.block;
        amax[b] = m == 32 ? largest_bits(x + at, 32) : largest_bits(x + at, m);
        if (amax[b] > largest && amax[b] < uint32_t(INF_BITS)) largest = amax[b];
    }
    const int k = row_exponent(f, largest);
    if (scale_head(f)) scales[0] = uint8_t(k + 127);
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t at = b * f.block, m = n - at < f.block ? n - at : f.block;
        if (m == 32)
            encode_block<FLOAT>(f, x + at, 32, amax[b], k, b, codes + at, scales);
        else
            encode_block<FLOAT>(f, x + at, m, amax[b], k, b, codes + at, scales);
    }
}

// --------------------------------------------------------------------------------------------- decoding
template <bool FLOAT>
static void decode_row(const MxFormat& f, const uint8_t* codes, const uint8_t* scales, int64_t n, float* values) {
    const int64_t blocks = (n + f.block - 1) / f.block;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t at = b * f.block, m = n - at < f.block ? n - at : f.block;
        const Factor scale = read_scale(f, scales, b);
        for (int64_t i = at; i < at + m; i += W)
            store_lanes(values + i, decode_lanes<FLOAT>(f, load_codes(codes + i), scale));
    }
}

// -------------------------------------------------------------------------------------------------- rows
// Converts n values; reads and writes no others.
template <class A, class B>
FA_INLINE void convert(const A* from, int64_t n, B* to) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    if (i < n) store_n(to + i, load_n(from + i, int(n - i)), int(n - i));
}

// The stretches of channels between outliers: body(first channel, first of those kept, length).
template <class Body>
FA_INLINE void each_stretch(const MxArgs& a, const Body& body) {
    int64_t channel = 0, kept = 0;
    for (int64_t o = 0; o <= a.outlier_count; o++) {
        const int64_t stop = o < a.outlier_count ? a.outliers[o] : a.n + a.outlier_count;
        body(channel, kept, stop - channel);
        kept += stop - channel;
        channel = stop + 1;
    }
}

// What a thread works with, a row of each: values, other values, outliers, largest magnitudes, codes.
struct MxBuffers {
    float* total;
    float* values;
    float* exact;
    uint32_t* amax;
    uint8_t* codes;
};

static int64_t mx_row_floats(const MxArgs& a) { return (a.n + 2 * W + 15) / 16 * 16; }
static int64_t mx_thread_bytes(const MxArgs& a) {
    const int64_t floats = mx_row_floats(a), exact = (a.outlier_count + 15) / 16 * 16;
    return 4 * (3 * floats + exact) + (floats + 63) / 64 * 64;
}
static size_t mx_workspace(const MxArgs& a, int threads) { return size_t(threads * mx_thread_bytes(a)); }

static MxBuffers mx_buffers(const MxArgs& a, void* workspace, int thread) {
    const int64_t floats = mx_row_floats(a), exact = (a.outlier_count + 15) / 16 * 16;
    float* p = reinterpret_cast<float*>(static_cast<char*>(workspace) + thread * mx_thread_bytes(a));
    return {p, p + floats, p + 2 * floats, reinterpret_cast<uint32_t*>(p + 2 * floats + exact),
            reinterpret_cast<uint8_t*>(p + 3 * floats + exact)};
}

template <class T>
static void mx_encode_rows(const MxArgs& a, int threads, void* workspace) {
    const MxFormat& f = a.format;
    const MxMessage& m = a.messages[0];
    const int64_t blocks = (a.n + f.block - 1) / f.block, scale_bytes = scale_head(f) + blocks * scale_width(f);
    const int64_t code_bytes = (a.n * f.bits + 7) / 8, hidden = a.n + a.outlier_count;
    parallel_ranges(a.rows, 1, threads, [&](int64_t lo, int64_t hi, int thread) {
        const MxBuffers w = mx_buffers(a, workspace, thread);
        for (int64_t r = lo; r < hi; r++) {
            const T* x = static_cast<const T*>(a.x) + r * hidden;
            each_stretch(a, [&](int64_t channel, int64_t kept, int64_t n) {
                convert(x + channel, n, w.values + kept);
            });
            for (int64_t o = 0; o < a.outlier_count; o++) {
                const bf16 value = from_float<bf16>(to_float(x[a.outliers[o]]));
                memcpy(m.outliers + 2 * (r * a.outlier_count + o), &value, 2);
            }
            if (a.rotate) rotate_row(w.values, a.n, a.rotate);
            (f.exponent_bits ? encode_row<true> : encode_row<false>)(f, w.values, a.n, w.amax, w.codes,
                                                                   m.scales + r * scale_bytes);
            pack_codes(w.codes, a.n, f.bits, m.codes + r * code_bytes);
        }
    });
}

template <class T>
static void mx_decode_rows(const MxArgs& a, int threads, void* workspace) {
    const MxFormat& f = a.format;
    const int64_t blocks = (a.n + f.block - 1) / f.block, scale_bytes = scale_head(f) + blocks * scale_width(f);
    const int64_t code_bytes = (a.n * f.bits + 7) / 8, hidden = a.n + a.outlier_count;
    parallel_ranges(a.rows, 1, threads, [&](int64_t lo, int64_t hi, int thread) {
        const MxBuffers w = mx_buffers(a, workspace, thread);
        for (int64_t r = lo; r < hi; r++) {
            for (int64_t i = 0; i < a.count; i++) {
                const MxMessage& m = a.messages[i];
                float* values = i ? w.values : w.total;
                unpack_codes(m.codes + r * code_bytes, a.n, f.bits, w.codes);
                (f.exponent_bits ? decode_row<true> : decode_row<false>)(f, w.codes, m.scales + r * scale_bytes,
                                                                       a.n, values);
                for (int64_t k = 0; i && k < a.n; k++) w.total[k] += values[k];
                for (int64_t o = 0; o < a.outlier_count; o++) {
                    bf16 value;
                    memcpy(&value, m.outliers + 2 * (r * a.outlier_count + o), 2);
                    w.exact[o] = i ? w.exact[o] + to_float(value) : to_float(value);
                }
            }
            if (a.rotate) rotate_row(w.total, a.n, a.rotate);
            T* out = static_cast<T*>(a.out) + r * hidden;
            each_stretch(a, [&](int64_t channel, int64_t kept, int64_t n) {
                convert(w.total + kept, n, out + channel);
            });
            for (int64_t o = 0; o < a.outlier_count; o++) out[a.outliers[o]] = from_float<T>(w.exact[o]);
        }
    });
}

static void mx_encode(const MxArgs& a, int threads, void* workspace) {
    if (a.dtype == DType::f32) return mx_encode_rows<float>(a, threads, workspace);
    if (a.dtype == DType::f16) return mx_encode_rows<f16>(a, threads, workspace);
    mx_encode_rows<bf16>(a, threads, workspace);
}

static void mx_decode_sum(const MxArgs& a, int threads, void* workspace) {
    if (a.dtype == DType::f32) return mx_decode_rows<float>(a, threads, workspace);
    if (a.dtype == DType::f16) return mx_decode_rows<f16>(a, threads, workspace);
    mx_decode_rows<bf16>(a, threads, workspace);
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

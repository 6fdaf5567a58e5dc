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

// Scales of the blocks of a row.
struct BlockScales {
    int32_t* code;
    float *first, *second, *size;
};

// What a thread works with: two rows of values, one of codes, outliers, and numbers of each block.
struct MxBuffers {
    float *total, *values, *exact, *errors, *cost;
    int32_t* amax;
    BlockScales best, tried;
    uint8_t* codes;
};

// Every array may be read and written 2 W places past its row.
static int64_t mx_row(const MxArgs& a) { return (a.n + 2 * W + 63) / 64 * 64; }
static int64_t mx_blocks(const MxArgs& a) { return (a.n / a.format.block + 2 * W + 63) / 64 * 64; }
static int64_t mx_thread_bytes(const MxArgs& a) {
    return 4 * (2 * mx_row(a) + 11 * mx_blocks(a) + (a.outlier_count + 15) / 16 * 16) + mx_row(a);
}
static size_t mx_workspace(const MxArgs& a, int threads) { return size_t(threads * mx_thread_bytes(a)); }

static MxBuffers mx_buffers(const MxArgs& a, void* workspace, int thread) {
    char* p = static_cast<char*>(workspace) + thread * mx_thread_bytes(a);
    const auto floats = [&p](int64_t n) {
        float* r = reinterpret_cast<float*>(p);
        p += 4 * n;
        return r;
    };
    const auto ints = [&](int64_t n) { return reinterpret_cast<int32_t*>(floats(n)); };
    const int64_t row = mx_row(a), blocks = mx_blocks(a);
    MxBuffers w;
    w.total = floats(row), w.values = floats(row), w.exact = floats((a.outlier_count + 15) / 16 * 16);
    w.errors = floats(blocks), w.cost = floats(blocks), w.amax = ints(blocks);
    w.best = {ints(blocks), floats(blocks), floats(blocks), floats(blocks)};
    w.tried = {ints(blocks), floats(blocks), floats(blocks), floats(blocks)};
    w.codes = reinterpret_cast<uint8_t*>(p);
    return w;
}

// body(block, its first value, its length) for each block; the usual length is a constant to the compiler.
template <class Body>
FA_INLINE void each_block(const MxFormat& f, int64_t n, const Body& body) {
    const int64_t whole = n / f.block;
    if (f.block == 32)
        for (int64_t b = 0; b < whole; b++) body(b, 32 * b, 32);
    else
        for (int64_t b = 0; b < whole; b++) body(b, f.block * b, f.block);
    if (whole * f.block < n) body(whole, whole * f.block, n - whole * f.block);
}
#define FA_BODY __attribute__((always_inline))

// --------------------------------------------------------------------------------------------- encoding
// Sum of the squared errors of a block (ERROR_STEPS in quant/mx.py): integers below 2^24, exact in any order.
template <bool FLOAT>
FA_INLINE float squared_errors(const MxFormat& f, const float* x, int64_t n, Factor inverse) {
    const float per_unit = 32.0f * power_of_two(f.mantissa_bits - f.emax), rounder = 8388608.0f;  // 2^23
    lanes sum = {};
    for (int64_t i = 0; i < n; i += W) {
        const lanes scaled = load_lanes(x + i) * inverse.first * inverse.second;
        const ilanes magnitude = keep_first((ilanes)scaled & ABS_BITS, n - i);
        const lanes error = nearest<FLOAT>(f, magnitude).rounded - (lanes)magnitude;
        const lanes units = (lanes)((ilanes)error & ABS_BITS) * per_unit;
        const lanes capped = units > 127.0f ? lanes{} + 127.0f : units;
        const lanes d = (capped + rounder) - rounder;
        sum += d * d;
    }
    vf r;
    memcpy(&r.v, &sum, sizeof r.v);
    return reduce_add(r);
}

// The scales that candidate c of the format gives; those of blocks that are not finite mean nothing.
static void candidate_scales(const MxFormat& f, int64_t blocks, const int32_t* amax, int k, int c,
                             const BlockScales& to) {
    for (int64_t b = 0; b < blocks; b += W) {
        ilanes largest;
        memcpy(&largest, amax + b, sizeof largest);
        const ilanes finite = largest < INF_BITS ? largest : ilanes{};
        const Scales s = f.scale == MxScale::e8m0 ? power_scales(f, finite, f.candidate[c])
                                                  : fine_scales(f, finite, k, f.candidate[c]);
        memcpy(to.code + b, &s.code, sizeof s.code);
        store_lanes(to.first + b, s.first);
        store_lanes(to.second + b, s.second);
        store_lanes(to.size + b, s.size);
    }
}

// Leaves each block's scale of the least cost, the first of equals, in w.best.
template <bool FLOAT>
static void search_scales(const MxFormat& f, int64_t n, int k, const MxBuffers& w) {
    const int64_t blocks = (n + f.block - 1) / f.block;
    for (int c = 0; c < f.candidates; c++) {
        const BlockScales& s = c ? w.tried : w.best;
        if (c) candidate_scales(f, blocks, w.amax, k, c, s);
        each_block(f, n, [&](int64_t b, int64_t at, int64_t m) FA_BODY {
            w.errors[b] = squared_errors<FLOAT>(f, w.values + at, m, {s.first[b], s.second[b]});
        });
        for (int64_t b = 0; b < blocks; b++) {
            const float cost = w.errors[b] * (s.size[b] * s.size[b]);
            const bool better = !c || cost < w.cost[b];
            w.cost[b] = better ? cost : w.cost[b];
            w.best.code[b] = better ? s.code[b] : w.best.code[b];
            w.best.first[b] = better ? s.first[b] : w.best.first[b];
            w.best.second[b] = better ? s.second[b] : w.best.second[b];
        }
    }
}

// w.values (n,) to one code a byte in w.codes, and scales.
template <bool FLOAT>
static void encode_row(const MxFormat& f, int64_t n, const MxBuffers& w, uint8_t* scales) {
    const int64_t blocks = (n + f.block - 1) / f.block;
    int32_t largest = 0;
    each_block(f, n, [&](int64_t b, int64_t at, int64_t m) FA_BODY {
        w.amax[b] = largest_bits(w.values + at, m);
        if (w.amax[b] > largest && w.amax[b] < INF_BITS) largest = w.amax[b];
    });
    const int k = row_exponent(f, largest);
    candidate_scales(f, blocks, w.amax, k, 0, w.best);
    if (f.candidates > 1) search_scales<FLOAT>(f, n, k, w);
    if (scale_head(f)) scales[0] = uint8_t(k + 127);
    each_block(f, n, [&](int64_t b, int64_t at, int64_t m) FA_BODY {
        const float first = w.best.first[b], second = w.best.second[b];
        for (int64_t i = at; i < at + m; i += W)
            store_codes(w.codes + i, encode_lanes<FLOAT>(f, load_lanes(w.values + i) * first * second));
        const bool finite = w.amax[b] < INF_BITS;
        if (!finite) memset(w.codes + at, 0, size_t(m));
        write_scale(f, scales, b, finite ? w.best.code[b] : nan_code(f));
    });
}

// --------------------------------------------------------------------------------------------- decoding
template <bool FLOAT>
static void decode_row(const MxFormat& f, int64_t n, const MxBuffers& w, const uint8_t* scales,
                       float* values) {
    const BlockScales& s = w.best;
    read_scales(f, scales, (n + f.block - 1) / f.block, s.first, s.second);
    each_block(f, n, [&](int64_t b, int64_t at, int64_t m) FA_BODY {
        const Factor scale = {s.first[b], s.second[b]};
        for (int64_t i = at; i < at + m; i += W)
            store_lanes(values + i, decode_lanes<FLOAT>(f, load_codes(w.codes + i), scale));
    });
}

// -------------------------------------------------------------------------------------------------- rows
static int64_t row_scale_bytes(const MxArgs& a) {
    const int64_t blocks = (a.n + a.format.block - 1) / a.format.block;
    return scale_head(a.format) + blocks * scale_width(a.format);
}

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

template <class T>
static void mx_encode_rows(const MxArgs& a, int threads, void* workspace) {
    const MxFormat& f = a.format;
    const MxMessage& m = a.messages[0];
    const int64_t code_bytes = (a.n * f.bits + 7) / 8, scale_bytes = row_scale_bytes(a);
    const int64_t hidden = a.n + a.outlier_count;
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
            const auto encode = f.exponent_bits ? encode_row<true> : encode_row<false>;
            encode(f, a.n, w, m.scales + r * scale_bytes);
            pack_codes(w.codes, a.n, f.bits, m.codes + r * code_bytes);
        }
    });
}

template <class T>
static void mx_decode_rows(const MxArgs& a, int threads, void* workspace) {
    const MxFormat& f = a.format;
    const int64_t code_bytes = (a.n * f.bits + 7) / 8, scale_bytes = row_scale_bytes(a);
    const int64_t hidden = a.n + a.outlier_count;
    parallel_ranges(a.rows, 1, threads, [&](int64_t lo, int64_t hi, int thread) {
        const MxBuffers w = mx_buffers(a, workspace, thread);
        for (int64_t r = lo; r < hi; r++) {
            for (int64_t i = 0; i < a.count; i++) {
                const MxMessage& m = a.messages[i];
                float* values = i ? w.values : w.total;
                unpack_codes(m.codes + r * code_bytes, a.n, f.bits, w.codes);
                const auto decode = f.exponent_bits ? decode_row<true> : decode_row<false>;
                decode(f, a.n, w, m.scales + r * scale_bytes, values);
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

// MX formats (quant/mx.py): scales, codes and bit packing. Plain loops over integers and floats that the
// compiler vectorizes for each instruction set.
#pragma once

#include "ops_table.hpp"
#include "parallel.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int MX_PIECE = 64;  // values in registers and L1 at a time

// 2^exponent for -126 <= exponent <= 127.
FA_INLINE float power_of_two(int exponent) { return bits_float(uint32_t(exponent + 127) << 23); }

// Magnitude bits of the largest value; NaN and infinities compare above every number.
template <class T>
static uint32_t largest_bits(const T* x, int64_t n) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t u = float_bits(to_float(x[i])) & 0x7fffffffu;
        largest = u > largest ? u : largest;
    }
    return largest;
}

FA_INLINE int scale_exponent(const MxArgs& a, uint32_t amax) {
    if (amax == 0) return -127;
    int shift = 0;
    while (!((amax << shift) & 0x7f800000u)) shift++;  // a subnormal, brought to the form of a normal number
    const uint32_t mantissa = (amax << shift) & 0x7fffffu;
    int exponent = int(amax >> 23) - 127 - a.emax;
    if (shift) exponent = -126 - shift - a.emax;
    if (mantissa > uint32_t(a.carry_above)) exponent++;
    return exponent < -127 ? -127 : exponent > 127 ? 127 : exponent;
}

// Adding a power of two whose last mantissa bit is worth one step of the element rounds to that step, ties
// to even, and leaves the number of steps in the low bits.
FA_INLINE uint32_t encode_float(const MxArgs& a, float scaled) {
    const uint32_t u = float_bits(scaled), magnitude = u & 0x7fffffffu;
    const int32_t lowest = 128 - a.bias;
    int32_t exponent = int32_t(magnitude >> 23);
    exponent = exponent < lowest ? lowest : exponent;
    const uint32_t anchor = uint32_t(exponent + 23 - a.mantissa_bits) << 23;
    const int32_t steps = int32_t(float_bits(bits_float(magnitude) + bits_float(anchor)) - anchor);
    int32_t code = steps + ((exponent - lowest) << a.mantissa_bits);
    code = code > a.max_code ? a.max_code : code;
    return uint32_t(code) | (u >> 31 << (a.bits - 1));
}
FA_INLINE uint32_t encode_int8(const MxArgs& a, float scaled) {
    const uint32_t anchor = 0x48400000u;  // 1.5 * 2^17: steps of 1/64
    int32_t steps = int32_t(float_bits(scaled + bits_float(anchor)) - anchor);
    steps = steps > a.max_code ? a.max_code : steps < -a.max_code ? -a.max_code : steps;
    return uint32_t(steps) & 255u;
}

template <class T>
static void encode_block(const MxArgs& a, const T* x, int64_t n, uint8_t* codes, uint8_t* scale) {
    const uint32_t amax = largest_bits(x, n);
    if (amax >= 0x7f800000u) {
        *scale = 255;
        memset(codes, 0, size_t(n));
        return;
    }
    const int exponent = scale_exponent(a, amax), half = -exponent / 2;
    *scale = uint8_t(exponent + 127);
    const float f0 = power_of_two(half), f1 = power_of_two(-exponent - half);  // both normal
    if (a.exponent_bits)
        for (int64_t i = 0; i < n; i++) codes[i] = uint8_t(encode_float(a, to_float(x[i]) * f0 * f1));
    else
        for (int64_t i = 0; i < n; i++) codes[i] = uint8_t(encode_int8(a, to_float(x[i]) * f0 * f1));
}

static void pack_bits(const uint8_t* codes, int64_t n, int bits, uint8_t* out) {
    if (bits == 8) {
        memcpy(out, codes, size_t(n));
    } else if (bits == 4) {
        for (int64_t i = 0; i < n / 2; i++) out[i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
        if (n % 2) out[n / 2] = codes[n - 1];
    } else {
        const int64_t bytes = (n * 6 + 7) / 8;
        int64_t i = 0, at = 0;
        for (; i + 4 <= n; i += 4, at += 3) {
            const uint32_t word = codes[i] | codes[i + 1] << 6 | codes[i + 2] << 12 | codes[i + 3] << 18;
            out[at] = uint8_t(word), out[at + 1] = uint8_t(word >> 8), out[at + 2] = uint8_t(word >> 16);
        }
        uint32_t word = 0;
        for (int shift = 0; i < n; i++, shift += 6) word |= uint32_t(codes[i]) << shift;
        for (; at < bytes; at++, word >>= 8) out[at] = uint8_t(word);
    }
}

static void unpack_bits(const uint8_t* in, int64_t n, int bits, uint8_t* codes) {
    if (bits == 8) {
        memcpy(codes, in, size_t(n));
    } else if (bits == 4) {
        for (int64_t i = 0; i < n / 2; i++) codes[2 * i] = in[i] & 15, codes[2 * i + 1] = in[i] >> 4;
        if (n % 2) codes[n - 1] = in[n / 2] & 15;
    } else {
        int64_t i = 0, at = 0;
        for (; i + 4 <= n; i += 4, at += 3) {
            const uint32_t word = in[at] | in[at + 1] << 8 | in[at + 2] << 16;
            for (int k = 0; k < 4; k++) codes[i + k] = uint8_t(word >> (6 * k) & 63);
        }
        uint32_t word = 0;
        for (int shift = 0; at < (n * 6 + 7) / 8; at++, shift += 8) word |= uint32_t(in[at]) << shift;
        for (; i < n; i++, word >>= 6) codes[i] = uint8_t(word & 63);
    }
}

FA_INLINE float code_value(const MxArgs& a, uint32_t code) {
    if (!a.exponent_bits) return float(int8_t(code)) / 64.0f;
    const uint32_t sign = code >> (a.bits - 1), magnitude = code & ((1u << (a.bits - 1)) - 1);
    const int exponent = int(magnitude >> a.mantissa_bits), top = (1 << a.exponent_bits) - 1;
    const int fraction = int(magnitude & ((1u << a.mantissa_bits) - 1));
    float value = float(fraction + (exponent ? 1 << a.mantissa_bits : 0)) *
                  power_of_two((exponent ? exponent : 1) - a.bias - a.mantissa_bits);
    // E4M3 has a NaN above its largest number, E5M2 an infinity and NaNs; the small formats have neither.
    if (int(magnitude) > a.max_code) value = exponent == top && fraction == 0 ? INF : __builtin_nanf("");
    return sign ? -value : value;
}

static size_t mx_workspace(const MxArgs& a, int threads) {
    return size_t(threads) * ((size_t(a.n) + 63) & ~size_t(63)) + 256 * sizeof(float);
}

template <class T>
static void mx_pack_rows(const MxArgs& a, int threads, void* workspace) {
    const int64_t blocks = (a.n + a.block - 1) / a.block, bytes = (a.n * a.bits + 7) / 8;
    parallel_ranges(a.rows, 1, threads, [&](int64_t lo, int64_t hi, int thread) {
        uint8_t* codes = static_cast<uint8_t*>(workspace) + int64_t(thread) * ((a.n + 63) / 64 * 64);
        for (int64_t r = lo; r < hi; r++) {
            const T* x = static_cast<const T*>(a.x) + r * a.n;
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t at = b * a.block, n = a.n - at < a.block ? a.n - at : a.block;
                encode_block(a, x + at, n, codes + at, a.scales + r * blocks + b);
            }
            pack_bits(codes, a.n, a.bits, a.codes + r * bytes);
        }
    });
}

static void mx_pack(const MxArgs& a, int threads, void* workspace) {
    if (a.dtype == DType::f32) return mx_pack_rows<float>(a, threads, workspace);
    if (a.dtype == DType::f16) return mx_pack_rows<f16>(a, threads, workspace);
    mx_pack_rows<bf16>(a, threads, workspace);
}

template <class T>
static void mx_unpack_rows(const MxArgs& a, int threads, void* workspace) {
    const int64_t blocks = (a.n + a.block - 1) / a.block, bytes = (a.n * a.bits + 7) / 8;
    float* table = static_cast<float*>(workspace);
    for (uint32_t code = 0; code < 1u << a.bits; code++) table[code] = code_value(a, code);
    parallel_ranges(a.rows, 1, threads, [&](int64_t lo, int64_t hi, int thread) {
        uint8_t* codes = reinterpret_cast<uint8_t*>(table + 256) + int64_t(thread) * ((a.n + 63) / 64 * 64);
        for (int64_t r = lo; r < hi; r++) {
            T* out = static_cast<T*>(const_cast<void*>(a.x)) + r * a.n;
            unpack_bits(a.codes + r * bytes, a.n, a.bits, codes);
            for (int64_t i = 0; i < a.n; i += MX_PIECE) {
                float values[MX_PIECE];
                const int n = a.n - i < MX_PIECE ? int(a.n - i) : MX_PIECE;
                for (int k = 0; k < n;) {
                    const int64_t block = (i + k) / a.block, end = (block + 1) * a.block - i;
                    const int scale = a.scales[r * blocks + block], stop = end < n ? int(end) : n;
                    const int half = (scale - 127) / 2;
                    const float f0 = scale == 255 ? __builtin_nanf("") : power_of_two(half);
                    const float f1 = power_of_two(scale == 255 ? 0 : scale - 127 - half);
                    for (; k < stop; k++) values[k] = table[codes[i + k]] * f0 * f1;
                }
                int k = 0;
                for (; k + W <= n; k += W) store(out + i + k, load(values + k));
                if (k < n) store_n(out + i + k, load_n(values + k, n - k), n - k);
            }
        }
    });
}

static void mx_unpack(const MxArgs& a, int threads, void* workspace) {
    if (a.dtype == DType::f32) return mx_unpack_rows<float>(a, threads, workspace);
    if (a.dtype == DType::f16) return mx_unpack_rows<f16>(a, threads, workspace);
    mx_unpack_rows<bf16>(a, threads, workspace);
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

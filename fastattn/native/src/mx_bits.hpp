// Codes of 3 to 8 bits, packed little-endian: eight of them fill `bits` bytes.
#pragma once

#include "simd.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// `codes` is written past n, up to a multiple of 8, with zeros.
template <int BITS>
static void pack_bits(uint8_t* codes, int64_t n, uint8_t* out) {
    memset(codes + n, 0, 8);
    for (; n > 0; n -= 8, codes += 8, out += BITS) {
        uint64_t word = 0;
        for (int k = 0; k < 8; k++) word |= uint64_t(codes[k]) << (BITS * k);
        const int64_t bytes = n < 8 ? (n * BITS + 7) / 8 : BITS;
        for (int64_t k = 0; k < bytes; k++) out[k] = uint8_t(word >> (8 * k));
    }
}
template <>
void pack_bits<4>(uint8_t* codes, int64_t n, uint8_t* out) {
    codes[n] = 0;
    for (int64_t i = 0; i < (n + 1) / 2; i++) out[i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
}

// Writes codes past n, up to a multiple of 8.
template <int BITS>
static void unpack_bits(const uint8_t* in, int64_t n, uint8_t* codes) {
    for (; n > 0; n -= 8, codes += 8, in += BITS) {
        uint64_t word = 0;
        const int64_t bytes = n < 8 ? (n * BITS + 7) / 8 : BITS;
        for (int64_t k = 0; k < bytes; k++) word |= uint64_t(in[k]) << (8 * k);
        for (int k = 0; k < 8; k++) codes[k] = uint8_t(word >> (BITS * k) & ((1 << BITS) - 1));
    }
}
template <>
void unpack_bits<4>(const uint8_t* in, int64_t n, uint8_t* codes) {
    for (int64_t i = 0; i < (n + 1) / 2; i++) codes[2 * i] = in[i] & 15, codes[2 * i + 1] = in[i] >> 4;
}

static void pack_codes(uint8_t* codes, int64_t n, int bits, uint8_t* out) {
    if (bits == 3) return pack_bits<3>(codes, n, out);
    if (bits == 4) return pack_bits<4>(codes, n, out);
    if (bits == 5) return pack_bits<5>(codes, n, out);
    if (bits == 6) return pack_bits<6>(codes, n, out);
    memcpy(out, codes, size_t(n));
}

static void unpack_codes(const uint8_t* in, int64_t n, int bits, uint8_t* codes) {
    if (bits == 3) return unpack_bits<3>(in, n, codes);
    if (bits == 4) return unpack_bits<4>(in, n, codes);
    if (bits == 5) return unpack_bits<5>(in, n, codes);
    if (bits == 6) return unpack_bits<6>(in, n, codes);
    memcpy(codes, in, size_t(n));
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn

// Codes of 3 to 8 bits, packed little-endian: eight of them fill `bits` bytes.
#pragma once

#include "simd.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Every second field of `width` bits, fields `pitch` bits apart.
constexpr uint64_t every_second(int width, int pitch) {
    uint64_t mask = 0;
    for (int at = 0; at < 64; at += 2 * pitch) mask |= ((uint64_t(1) << width) - 1) << at;
    return mask;
}

// Eight bytes below 2^BITS, moved together to the low 8 BITS bits: pairs, then fours, then all.
template <int BITS>
FA_INLINE uint64_t gather_fields(uint64_t w) {
    constexpr uint64_t ones = every_second(BITS, 8), twos = every_second(2 * BITS, 16);
    constexpr uint64_t fours = every_second(4 * BITS, 32);
    w = (w & ones) | (w >> (8 - BITS) & ones << BITS);
    w = (w & twos) | (w >> (16 - 2 * BITS) & twos << 2 * BITS);
    return (w & fours) | (w >> (32 - 4 * BITS) & fours << 4 * BITS);
}
template <int BITS>
FA_INLINE uint64_t spread_fields(uint64_t w) {
    constexpr uint64_t ones = every_second(BITS, 8), twos = every_second(2 * BITS, 16);
    constexpr uint64_t fours = every_second(4 * BITS, 32);
    w = (w & fours) | (w & fours << 4 * BITS) << (32 - 4 * BITS);
    w = (w & twos) | (w & twos << 2 * BITS) << (16 - 2 * BITS);
    return (w & ones) | (w & ones << BITS) << (8 - BITS);
}

// Copies `bytes`, which is mostly 8 or more, of which 8 suffice.
FA_INLINE void copy_eight(void* to, const void* from, int64_t bytes) {
    if (bytes >= 8)
        memcpy(to, from, 8);
    else
        memcpy(to, from, size_t(bytes));
}

// `codes` is written past n, up to a multiple of 8, with zeros.
template <int BITS>
static void pack_bits(uint8_t* codes, int64_t n, uint8_t* out) {
    memset(codes + n, 0, 8);
    for (int64_t left = (n * BITS + 7) / 8; left > 0; left -= BITS, codes += 8, out += BITS) {
        uint64_t word;
        memcpy(&word, codes, 8);
        word = gather_fields<BITS>(word);
        copy_eight(out, &word, left);  // the next word overwrites what is too much
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
    for (int64_t left = (n * BITS + 7) / 8; left > 0; left -= BITS, codes += 8, in += BITS) {
        uint64_t word = 0;
        copy_eight(&word, in, left);
        word = spread_fields<BITS>(word);
        memcpy(codes, &word, 8);
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

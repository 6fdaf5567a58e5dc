// The host half of kernels/primitives.cuh: the same names, every access through the emulated machine.
// `site` is never passed by kernels; its default is the line of the call.
#pragma once

#include <cmath>
#include <cstring>

#include "types.hpp"

#define VOLTA_KERNEL(name, threads, min_blocks) static void name
#define VOLTA_DEVICE inline

namespace volta {

namespace emulator {

// The machine, see machine.cpp. Reads and writes are `bytes` wide and naturally aligned.
u32 thread_index() __attribute__((const));
u32 block_index(int axis) __attribute__((const));
u32 grid_size(int axis) __attribute__((const));
const void* shared_load(u32 address, u32 bytes, Site site);
void shared_store(u32 address, const void* value, u32 bytes, Site site);
void global_load(const void* address, u32 bytes, Site site);
void global_store(void* address, u32 bytes, Site site);
u32 global_atomic_add(u32* address, u32 value, Site site);
void memory_fence();
void block_barrier(Site site);
void warp_barrier(Site site);
u32 exchange_xor(u32 value, u32 mask, Site site);
u32 exchange(u32 value, u32 lane, Site site);
bool vote_any(bool value, Site site);
void mma(float (&d)[8], Word2 a, Word2 b, bool b_is_row, Site site);

template <typename T>
T shared_value(u32 address, Site site) {
    T v;
    std::memcpy(&v, shared_load(address, sizeof(T), site), sizeof(T));
    return v;
}

template <typename To, typename From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits only change their name");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

// .ftz: subnormal inputs and results become zero, with their sign.
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

}  // namespace emulator

#define VOLTA_SITE emulator::Site site = emulator::Site::here(__builtin_FILE(), __builtin_LINE())

// ------------------------------------------------------------------------------------ position of a thread
VOLTA_DEVICE u32 thread_index() { return emulator::thread_index(); }
VOLTA_DEVICE u32 lane_index() { return emulator::thread_index() & 31; }
VOLTA_DEVICE u32 warp_index() { return emulator::thread_index() >> 5; }
VOLTA_DEVICE u32 block_x() { return emulator::block_index(0); }
VOLTA_DEVICE u32 block_y() { return emulator::block_index(1); }
VOLTA_DEVICE u32 block_z() { return emulator::block_index(2); }
VOLTA_DEVICE u32 grid_x() { return emulator::grid_size(0); }

// ------------------------------------------------------------------------------------------ shared memory
// Not at zero: an address that lacks the base is out of bounds.
VOLTA_DEVICE u32 shared_base() { return 1024; }
VOLTA_DEVICE u32 lds32(u32 address, VOLTA_SITE) { return emulator::shared_value<u32>(address, site); }
VOLTA_DEVICE Word2 lds64(u32 address, VOLTA_SITE) { return emulator::shared_value<Word2>(address, site); }
VOLTA_DEVICE Word4 lds128(u32 address, VOLTA_SITE) { return emulator::shared_value<Word4>(address, site); }
VOLTA_DEVICE void sts32(u32 address, u32 v, VOLTA_SITE) { emulator::shared_store(address, &v, 4, site); }
VOLTA_DEVICE void sts64(u32 address, Word2 v, VOLTA_SITE) { emulator::shared_store(address, &v, 8, site); }
VOLTA_DEVICE void sts128(u32 address, Word4 v, VOLTA_SITE) { emulator::shared_store(address, &v, 16, site); }

// ------------------------------------------------------------------------------------------ global memory
template <typename T>
VOLTA_DEVICE T ldg(const T* p, VOLTA_SITE) {
    static_assert(sizeof(T) <= 16, "no instruction loads more");
    emulator::global_load(p, sizeof(T), site);
    return *p;
}
template <typename T>
VOLTA_DEVICE void stg(T* p, T v, VOLTA_SITE) {
    emulator::global_store(p, sizeof(T), site);
    *p = v;
}
VOLTA_DEVICE Word4 ldg128_stream(const void* p, VOLTA_SITE) {
    emulator::global_load(p, sizeof(Word4), site);
    return *static_cast<const Word4*>(p);
}

// ------------------------------------------------------------------------------------------- synchronisation
VOLTA_DEVICE void barrier(VOLTA_SITE) { emulator::block_barrier(site); }
VOLTA_DEVICE void warp_barrier(VOLTA_SITE) { emulator::warp_barrier(site); }
VOLTA_DEVICE u32 shuffle_xor(u32 v, u32 mask, VOLTA_SITE) { return emulator::exchange_xor(v, mask, site); }
VOLTA_DEVICE float shuffle_xor(float v, u32 mask, VOLTA_SITE) {
    return emulator::bits<float>(emulator::exchange_xor(emulator::bits<u32>(v), mask, site));
}
VOLTA_DEVICE u32 shuffle(u32 v, u32 lane, VOLTA_SITE) { return emulator::exchange(v, lane, site); }
VOLTA_DEVICE float shuffle(float v, u32 lane, VOLTA_SITE) {
    return emulator::bits<float>(emulator::exchange(emulator::bits<u32>(v), lane, site));
}
VOLTA_DEVICE u32 uniform(u32 v, VOLTA_SITE) { return shuffle(v, 0, site); }
template <typename T>
VOLTA_DEVICE T pin(T v) {
    return v;
}
VOLTA_DEVICE bool any_lane(bool v, VOLTA_SITE) { return emulator::vote_any(v, site); }
VOLTA_DEVICE bool unlikely(bool v) { return v; }

// ---------------------------------------------------------------------------------------------- tensor cores
VOLTA_DEVICE void mma_rc(float (&d)[8], Word2 a, Word2 b, VOLTA_SITE) { emulator::mma(d, a, b, false, site); }
VOLTA_DEVICE void mma_rr(float (&d)[8], Word2 a, Word2 b, VOLTA_SITE) { emulator::mma(d, a, b, true, site); }

// ------------------------------------------------------------------------------------------------ arithmetic
// The machine's approximations are within 2 units in the last place of these.
VOLTA_DEVICE float exp2_approx(float x) { return emulator::flush(::exp2f(emulator::flush(x))); }
VOLTA_DEVICE float log2_approx(float x) { return ::log2f(emulator::flush(x)); }
VOLTA_DEVICE float rcp_approx(float x) { return emulator::flush(1.0f / emulator::flush(x)); }
VOLTA_DEVICE float rsqrt_approx(float x) { return 1.0f / ::sqrtf(emulator::flush(x)); }
// A product of floats is exact in double. Where the sum is not, its error decides (Knuth, TAOCP 4.2.2,
// theorem B).
VOLTA_DEVICE float multiply_add_up(float a, float b, float c) {
    const double product = static_cast<double>(a) * b;
    const double sum = product + c;
    const double part = sum - product;
    const double error = (product - (sum - part)) + (c - part);
    const float near = static_cast<float>(sum);
    const bool below = near < sum || (near == sum && error > 0.0);
    return below ? ::nextafterf(near, __builtin_inff()) : near;
}
VOLTA_DEVICE u32 float_bits(float x) { return emulator::bits<u32>(x); }
VOLTA_DEVICE float bits_float(u32 x) { return emulator::bits<float>(x); }
VOLTA_DEVICE u16 to_half(float x) { return emulator::bits<u16>(static_cast<emulator::Half>(x)); }
VOLTA_DEVICE float from_half(u16 h) { return static_cast<float>(emulator::bits<emulator::Half>(h)); }
VOLTA_DEVICE u32 pack_half2(float low, float high) {
    return to_half(low) | static_cast<u32>(to_half(high)) << 16;
}
VOLTA_DEVICE float low_half(u32 v) { return from_half(static_cast<u16>(v & 0xffff)); }
VOLTA_DEVICE float high_half(u32 v) { return from_half(static_cast<u16>(v >> 16)); }
VOLTA_DEVICE u64 multiply_add_wide(u32 a, u32 b, u64 c) { return static_cast<u64>(a) * b + c; }
VOLTA_DEVICE u32 shift_left(u32 v, u32 places) { return places < 32 ? v << places : 0; }
VOLTA_DEVICE u32 shift_right(u32 v, u32 places) { return places < 32 ? v >> places : 0; }
VOLTA_DEVICE u32 byte_permute(u32 a, u32 b, u32 selector) {
    const u64 both = a | static_cast<u64>(b) << 32;
    u32 d = 0;
    for (u32 i = 0; i < 4; i++) {
        const u32 pick = selector >> (4 * i);
        u32 byte = static_cast<u32>(both >> (8 * (pick & 7))) & 0xff;
        if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
        d |= byte << (8 * i);
    }
    return d;
}
template <u32 TABLE>
VOLTA_DEVICE u32 lop3(u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (u32 i = 0; i < 8; i++)
        if (TABLE >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return d;
}

#undef VOLTA_SITE

}  // namespace volta

// Every machine operation that the kernels use: as PTX for sm_70 here, and under the same names for the
// host in emulator/primitives.hpp. A kernel touches memory, other lanes and tensor cores only through
// these, so that the emulator sees every access.
#pragma once

#ifdef VOLTA_EMULATOR
#include "../emulator/primitives.hpp"
#else

#define VOLTA_KERNEL(name, threads, min_blocks) extern "C" __global__ void __launch_bounds__(threads, min_blocks) name
#define VOLTA_DEVICE __device__ __forceinline__

namespace volta {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

// Two or four packed 32-bit words; halves are packed in pairs, the lower index in the lower 16 bits.
struct alignas(8) Word2 {
    u32 x, y;
};
struct alignas(16) Word4 {
    u32 x, y, z, w;
};

// ------------------------------------------------------------------------------------ position of a thread
VOLTA_DEVICE u32 thread_index() { return threadIdx.x; }
VOLTA_DEVICE u32 lane_index() { return threadIdx.x & 31; }
VOLTA_DEVICE u32 warp_index() { return threadIdx.x >> 5; }
VOLTA_DEVICE u32 block_x() { return blockIdx.x; }
VOLTA_DEVICE u32 block_y() { return blockIdx.y; }
VOLTA_DEVICE u32 block_z() { return blockIdx.z; }
VOLTA_DEVICE u32 grid_x() { return gridDim.x; }

// ------------------------------------------------------------------------------------------ shared memory
// Addresses are bytes in the shared window; a block's dynamic memory begins at shared_base().
VOLTA_DEVICE u32 shared_base() {
    extern __shared__ __align__(128) u32 shared_words[];
    return static_cast<u32>(__cvta_generic_to_shared(shared_words));
}
VOLTA_DEVICE u32 lds32(u32 address) {
    u32 v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}
VOLTA_DEVICE Word2 lds64(u32 address) {
    Word2 v;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}
VOLTA_DEVICE Word4 lds128(u32 address) {
    Word4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}
VOLTA_DEVICE void sts32(u32 address, u32 v) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
VOLTA_DEVICE void sts64(u32 address, Word2 v) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}
VOLTA_DEVICE void sts128(u32 address, Word4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// ------------------------------------------------------------------------------------------ global memory
template <typename T>
VOLTA_DEVICE T ldg(const T* p) { return *p; }
template <typename T>
VOLTA_DEVICE void stg(T* p, T v) { *p = v; }
// Whole: the compiler would split a struct and does not always join its words again.
VOLTA_DEVICE void stg(Word2* p, Word2 v) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}
VOLTA_DEVICE void stg(Word4* p, Word4 v) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
// Read once, kept out of L1: the streams of keys, values and weights.
VOLTA_DEVICE Word4 ldg128_stream(const void* p) {
    Word4 v;
    asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

// ------------------------------------------------------------------------------------------- synchronisation
VOLTA_DEVICE void barrier() { __syncthreads(); }
VOLTA_DEVICE void warp_barrier() { __syncwarp(); }
VOLTA_DEVICE u32 shuffle_xor(u32 v, u32 mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
VOLTA_DEVICE float shuffle_xor(float v, u32 mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
VOLTA_DEVICE u32 shuffle(u32 v, u32 lane) { return __shfl_sync(0xffffffffu, v, lane); }
VOLTA_DEVICE float shuffle(float v, u32 lane) { return __shfl_sync(0xffffffffu, v, lane); }
// The same value, but one that the assembler cannot compute again: it stays in a register.
VOLTA_DEVICE u32 pin(u32 v) { return __shfl_sync(0xffffffffu, v, threadIdx.x & 31); }
// A value that all lanes of the warp have alike, so that the compiler knows it: branches on it are uniform.
VOLTA_DEVICE u32 uniform(u32 v) { return __shfl_sync(0xffffffffu, v, 0); }
template <typename T>
VOLTA_DEVICE const T* pin(const T* p) {
    u64 v = reinterpret_cast<u64>(p);
    u64 high = pin(static_cast<u32>(v >> 32));
    return reinterpret_cast<const T*>(high << 32 | pin(static_cast<u32>(v)));
}
VOLTA_DEVICE bool any_lane(bool v) { return __any_sync(0xffffffffu, v); }
// For a condition whose code belongs out of the way of the rest.
VOLTA_DEVICE bool unlikely(bool v) { return __builtin_expect(v, false); }

// ---------------------------------------------------------------------------------------------- tensor cores
// Four independent 8x8x4 products, one a quadpair (lanes 4q..4q+3 and 16+4q..19+4q); d += a b.
// PTX ISA, "Matrix Fragments for mma.m8n8k4 with .f16 floating point type". A is a row operand; B is a column
// operand (mma_rc) or a row operand (mma_rr).
#define VOLTA_MMA(name, layouts)                                                                            \
    VOLTA_DEVICE void name(float (&d)[8], Word2 a, Word2 b) {                                               \
        asm volatile("mma.sync.aligned.m8n8k4." layouts ".f32.f16.f16.f32 "                                 \
                     "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, {%10, %11}, "                             \
                     "{%0, %1, %2, %3, %4, %5, %6, %7};"                                                    \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),   \
                       "+f"(d[7])                                                                           \
                     : "r"(a.x), "r"(a.y), "r"(b.x), "r"(b.y));                                             \
    }
VOLTA_MMA(mma_rc, "row.col")
VOLTA_MMA(mma_rr, "row.row")
#undef VOLTA_MMA

// ------------------------------------------------------------------------------------------------ arithmetic
VOLTA_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
VOLTA_DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
VOLTA_DEVICE float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
VOLTA_DEVICE float rsqrt_approx(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// a b + c, rounded up.
VOLTA_DEVICE float multiply_add_up(float a, float b, float c) { return __fmaf_ru(a, b, c); }
VOLTA_DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
VOLTA_DEVICE float bits_float(u32 x) { return __uint_as_float(x); }
VOLTA_DEVICE u16 to_half(float x) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}
VOLTA_DEVICE float from_half(u16 h) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
}
VOLTA_DEVICE u32 pack_half2(float low, float high) {
    u32 v;
    asm("mov.b32 %0, {%1, %2};" : "=r"(v) : "h"(to_half(low)), "h"(to_half(high)));
    return v;
}
VOLTA_DEVICE float low_half(u32 v) { return from_half(static_cast<u16>(v & 0xffff)); }
VOLTA_DEVICE float high_half(u32 v) { return from_half(static_cast<u16>(v >> 16)); }
VOLTA_DEVICE u64 multiply_add_wide(u32 a, u32 b, u64 c) {
    u64 d;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(d) : "r"(a), "r"(b), "l"(c));
    return d;
}
// Zero from 32 places on.
VOLTA_DEVICE u32 shift_left(u32 v, u32 places) {
    u32 d;
    asm("shl.b32 %0, %1, %2;" : "=r"(d) : "r"(v), "r"(places));
    return d;
}
VOLTA_DEVICE u32 shift_right(u32 v, u32 places) {
    u32 d;
    asm("shr.u32 %0, %1, %2;" : "=r"(d) : "r"(v), "r"(places));
    return d;
}
VOLTA_DEVICE u32 byte_permute(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
// Any function of three bits, bit by bit; TABLE is its value for a = 0xf0, b = 0xcc, c = 0xaa.
template <u32 TABLE>
VOLTA_DEVICE u32 lop3(u32 a, u32 b, u32 c) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
    return d;
}

}  // namespace volta

#endif

// Kernels with one fault each, and controls without it: what the emulator's checks must tell apart.
#include "primitives.cuh"

// Machine operations that no kernel uses, in the two forms of primitives.cuh.
namespace volta {
#ifdef VOLTA_EMULATOR
#define SITE emulator::Site site = emulator::Site::here(__builtin_FILE(), __builtin_LINE())
VOLTA_DEVICE void sts16(u32 address, u16 v, SITE) { emulator::shared_store(address, &v, 2, site); }
VOLTA_DEVICE u32 atomic_add(u32* p, u32 v, SITE) { return emulator::global_atomic_add(p, v, site); }
VOLTA_DEVICE void memory_fence() { emulator::memory_fence(); }
#undef SITE
#else
VOLTA_DEVICE void sts16(u32 address, u16 v) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}
VOLTA_DEVICE u32 atomic_add(u32* p, u32 v) { return atomicAdd(p, v); }
VOLTA_DEVICE void memory_fence() { __threadfence(); }
#endif
}  // namespace volta

using namespace volta;

struct Params {
    u32* out;          // two words for each thread of the grid, and a counter behind them
    const u32* in;     // a word for each thread of a block
    const u32* table;  // of lanes: an address or a source lane
    u32 plant;
    u32 bytes;  // of dynamic shared memory
};

enum Plant : u32 {
    CONTROL,
    MISSING_BARRIER,
    MISSING_SECOND_BARRIER,
    STORE_AFTER_OTHERS_LOAD,
    TWO_WRITERS,
    HALVES_OF_A_WORD,
    WARP_BARRIER,
    MISSING_WARP_BARRIER,
    SHUFFLE_FOR_A_BARRIER,
    WARP_BARRIER_FOR_A_BLOCK,
    SHARED_OVERRUN,
    SHARED_BELOW_BASE,
    SHARED_MISALIGNED,
    UNINITIALISED,
    HALF_INITIALISED,
    STALE_FROM_ANOTHER_BLOCK,
    GLOBAL_LOAD_OVERRUN,
    GLOBAL_STORE_OVERRUN,
    GLOBAL_STORE_TO_INPUT,
    GLOBAL_MISALIGNED,
    GLOBAL_NULL,
    BARRIER_IN_BRANCH_OF_WARPS,
    BARRIER_IN_BRANCH_OF_LANES,
    TWO_BARRIERS,
    EXIT_BEFORE_BARRIER,
    LANE_EXITS_BEFORE_SHUFFLE,
    SHUFFLE_IN_BRANCH,
    MMA_IN_BRANCH,
    WARP_EXITS,
    TWO_BLOCKS_STORE,
    LOAD_FROM_ANOTHER_BLOCK,
    LAST_BLOCK_ADDS_UP,
    LAST_BLOCK_WITHOUT_FENCE,
};

VOLTA_DEVICE u32 word(u32 i) { return shared_base() + 4 * i; }

VOLTA_DEVICE u32 reversed_through_shared(const Params& p, bool first, bool second) {
    const u32 t = thread_index();
    sts32(word(t), ldg(p.in + t));
    if (first) barrier();
    const u32 v = lds32(word(63 - t));
    if (second) barrier();
    sts32(word(t), v);
    return v;
}

VOLTA_DEVICE u32 neighbour_within_warp(const Params& p, bool ordered, bool shuffled) {
    const u32 t = thread_index();
    sts32(word(t), ldg(p.in + t));
    if (ordered) warp_barrier();
    if (shuffled) shuffle_xor(t, 1);
    return lds32(word(t ^ 1));
}

// Each block stores; the last one to come, as an atomic tells, adds up what all have stored.
VOLTA_DEVICE void last_block_adds_up(const Params& p, bool fenced) {
    const u32 t = thread_index();
    stg(p.out + 64 * block_x() + t, block_x() + 1);
    if (fenced) memory_fence();
    barrier();
    if (t == 0) sts32(word(0), atomic_add(p.out + 128 * grid_x(), 1));
    barrier();
    u32 sum = block_x() + 1;
    if (lds32(word(0)) == grid_x() - 1)
        for (u32 b = 0; b < block_x(); b++) sum += ldg(static_cast<const u32*>(p.out) + 64 * b + t);
    stg(p.out + 64 * grid_x() + 64 * block_x() + t, sum);
}

VOLTA_KERNEL(planted, 64, 1)(Params p) {
    const u32 t = thread_index();
    u32 result = 0;
    switch (p.plant) {
        case CONTROL: result = reversed_through_shared(p, true, true); break;
        case MISSING_BARRIER: result = reversed_through_shared(p, false, true); break;
        case MISSING_SECOND_BARRIER: result = reversed_through_shared(p, true, false); break;
        case STORE_AFTER_OTHERS_LOAD:
            sts32(word(t), t);
            barrier();
            result = lds32(word(0));
            if (t == 40) sts32(word(0), t);
            break;
        case TWO_WRITERS: sts32(word(t / 2), t); break;
        case HALVES_OF_A_WORD:
            sts16(shared_base() + 2 * t, static_cast<u16>(t));
            barrier();
            result = lds32(word(t / 2));
            break;
        case WARP_BARRIER: result = neighbour_within_warp(p, true, false); break;
        case MISSING_WARP_BARRIER: result = neighbour_within_warp(p, false, false); break;
        case SHUFFLE_FOR_A_BARRIER: result = neighbour_within_warp(p, false, true); break;
        case WARP_BARRIER_FOR_A_BLOCK:
            sts32(word(t), t);
            warp_barrier();
            result = lds32(word(63 - t));
            break;
        case SHARED_OVERRUN: sts32(shared_base() + p.bytes - 4 * (63 - t), t); break;
        case SHARED_BELOW_BASE: sts32(4 * t, t); break;
        case SHARED_MISALIGNED: sts64(word(3 * t), Word2{t, t}); break;
        case UNINITIALISED:
            if (t != 17) sts32(word(t), t);
            barrier();
            result = lds32(word(t));
            break;
        case HALF_INITIALISED:
            sts16(word(t), static_cast<u16>(t));
            result = lds32(word(t));
            break;
        case STALE_FROM_ANOTHER_BLOCK:
            if (block_x() == 0) sts32(word(t), t);
            result = lds32(word(t));
            break;
        case GLOBAL_LOAD_OVERRUN: result = ldg(p.in + t + 1); break;
        case GLOBAL_STORE_OVERRUN:
            if (t == 63) stg(p.out + 128 * grid_x() + 1, t);
            break;
        case GLOBAL_STORE_TO_INPUT: stg(const_cast<u32*>(p.in) + t, t); break;
        case GLOBAL_MISALIGNED: result = ldg128_stream(p.in + t / 2).x; break;
        case GLOBAL_NULL: result = ldg(static_cast<const u32*>(nullptr)); break;
        case BARRIER_IN_BRANCH_OF_WARPS:
            if (warp_index() == 0) barrier();
            break;
        case BARRIER_IN_BRANCH_OF_LANES:
            if (lane_index() < 16) barrier();
            break;
        case TWO_BARRIERS:
            if (warp_index() == 0)
                barrier();
            else
                barrier();
            break;
        case EXIT_BEFORE_BARRIER:
            if (t == 63) return;
            barrier();
            break;
        case LANE_EXITS_BEFORE_SHUFFLE:
            if (t == 5) return;
            result = shuffle_xor(t, 1);
            break;
        case SHUFFLE_IN_BRANCH:
            if (t & 1)
                result = shuffle(t, 0);
            else
                result = shuffle(t, 1);
            break;
        case MMA_IN_BRANCH: {
            float d[8] = {};
            if (t < 48) mma_rc(d, Word2{0, 0}, Word2{0, 0});
            break;
        }
        case WARP_EXITS:
            if (warp_index() == 1) return;
            result = shuffle_xor(t, 1);
            break;
        case TWO_BLOCKS_STORE: stg(p.out + t, t); break;
        case LOAD_FROM_ANOTHER_BLOCK:
            if (block_x() == 1) result = ldg(static_cast<const u32*>(p.out) + t);
            break;
        case LAST_BLOCK_ADDS_UP: last_block_adds_up(p, true); return;
        case LAST_BLOCK_WITHOUT_FENCE: last_block_adds_up(p, false); return;
    }
    stg(p.out + 64 * block_x() + t, result);
}

// One access of each lane, wherever the table says.
VOLTA_KERNEL(one_access, 32, 1)(Params p) {
    const u32 t = thread_index();
    for (u32 i = t; i < p.bytes / 4; i += 32) sts32(word(i), i);
    barrier();
    const u32 at = p.table[t];
    const u32 address = shared_base() + at;
    switch (p.plant) {
        case 0: sts16(address, 1); break;
        case 1: lds32(address); break;
        case 2: lds64(address); break;
        case 3: lds128(address); break;
        case 4: ldg(p.in + at / 4); break;
        case 5: ldg128_stream(p.in + at / 4); break;
        case 6: stg(reinterpret_cast<u16*>(p.out) + at / 2, u16{1}); break;
    }
}

// Shuffles and votes: plant 0 shuffle_xor with mask bytes, 1 shuffle from table, 2 any_lane(table != 0).
VOLTA_KERNEL(lanes, 64, 1)(Params p) {
    const u32 t = thread_index();
    const u32 v = ldg(p.in + t);
    const u32 argument = ldg(p.table + t % 32);
    u32 result = 0;
    if (p.plant == 0) result = shuffle_xor(v, p.bytes);
    if (p.plant == 1) result = float_bits(shuffle(bits_float(v), argument));
    if (p.plant == 2) result = any_lane(argument == v);
    stg(p.out + t, result);
}

struct Nested {
    u32 first, second;
};
struct NestedParams {
    u32* out;
    Nested pair;
};

VOLTA_KERNEL(nested, 32, 1)(NestedParams p) {
    if (thread_index() == 0) stg(p.out, p.pair.first + p.pair.second);
}

struct MmaParams {
    float* d;       // [32][8], read and written
    const Word2* a;  // [32]
    const Word2* b;
    u32 b_is_row;
    u32 repeat;
};

VOLTA_KERNEL(one_mma, 32, 1)(MmaParams p) {
    const u32 t = thread_index();
    float d[8];
    for (u32 i = 0; i < 8; i++) d[i] = ldg(p.d + 8 * t + i);
    for (u32 i = 0; i < p.repeat; i++) {
        if (p.b_is_row)
            mma_rr(d, ldg(p.a + t), ldg(p.b + t));
        else
            mma_rc(d, ldg(p.a + t), ldg(p.b + t));
    }
    for (u32 i = 0; i < 8; i++) stg(p.d + 8 * t + i, d[i]);
}

struct ArithmeticParams {
    u32* out;  // [threads][10]
    const u32* a;
    const u32* b;
    const u32* c;
};

VOLTA_KERNEL(arithmetic, 32, 1)(ArithmeticParams p) {
    const u32 t = thread_index() + 32 * block_x();
    const u32 a = ldg(p.a + t), b = ldg(p.b + t), c = ldg(p.c + t);
    const float x = bits_float(a);
    const u32 results[10] = {float_bits(exp2_approx(x)),
                             float_bits(log2_approx(x)),
                             float_bits(rcp_approx(x)),
                             float_bits(rsqrt_approx(x)),
                             to_half(x),
                             float_bits(low_half(a)),
                             pack_half2(x, bits_float(b)),
                             byte_permute(a, b, c),
                             lop3<0xca>(a, b, c),
                             float_bits(multiply_add_up(x, bits_float(b), bits_float(c)))};
    for (u32 i = 0; i < 10; i++) stg(p.out + 10 * t + i, results[i]);
}

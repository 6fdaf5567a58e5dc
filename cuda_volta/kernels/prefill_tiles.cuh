// Tiles of K and V: from global memory to registers while the tensor cores work, then to shared memory.
#pragma once

#include "prefill_sequence.cuh"

namespace volta {

// Eight lanes read 128 consecutive bytes of a row; where a row ends with 64 bytes, four lanes read those of a row
// and four those of the row eight below, so that a store of eight lanes meets every bank once.
constexpr int GROUPS = HEAD_DIM / 64;
constexpr bool TAIL = HEAD_DIM % 64 != 0;
static_assert(HEAD_DIM % 64 == 0 || HEAD_DIM % 64 == 32, "head_dim: a multiple of 32");
constexpr int PASSES = GROUPS ? 8 * BLOCK_K / THREADS : 0;
constexpr int PASS_ROWS = THREADS / 8;
constexpr int SLOTS = PASSES + TAIL;              // rows of a tile that one thread reads
constexpr int LOADS = PASSES * GROUPS + TAIL;     // 16-byte chunks of a tile that one thread reads

struct Stage {
    Word4 chunk[LOADS];
};

// Which rows and chunks of every tile a thread moves.
// Which rows and chunks of every tile a thread moves, and where they go.
struct Mover {
    u32 row, tail_row;    // within the tile
    u32 store_at, store_tail_at;
    bool has_tail;

    VOLTA_DEVICE explicit Mover(u32 thread)
        : row(thread >> 3),
          tail_row((thread >> 3 & 7) | (thread & 4) << 1 | (thread >> 2 & 16)),
          store_at(pin(row * PITCH + 16 * ((thread & 7) ^ swizzle(row)))),
          store_tail_at(TAIL ? pin(tail_row * PITCH + 128 * GROUPS + 16 * ((thread & 3) ^ swizzle(tail_row))) : 0),
          has_tail(TAIL && (THREADS == 4 * BLOCK_K || thread < 4 * BLOCK_K)) {}

    VOLTA_DEVICE i32 slot_row(int slot) const {
        return static_cast<i32>(slot < PASSES ? row + static_cast<u32>(slot * PASS_ROWS) : tail_row);
    }

    VOLTA_DEVICE void store(u32 tile, const Stage& stage) const {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
                sts128(store_at + tile + static_cast<u32>(pass * PASS_ROWS * PITCH + g * 128),
                       stage.chunk[pass * GROUPS + g]);
            }
        }
        if (has_tail) sts128(store_tail_at + tile, stage.chunk[PASSES * GROUPS]);
    }
};

// Rows of the cache that hold this thread's keys of one tile. Rows of pages are counted through: page * page_rows.
struct CacheRows {
    u32 row[SLOTS];

    VOLTA_DEVICE void locate(const PrefillParams& p, const Sequence& s, const Mover& mover, i32 key0) {
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            i32 key = key0 + mover.slot_row(slot);
            row[slot] = static_cast<u32>((key < s.k_len ? key : s.k_len - 1) + s.k_row);
        }
        if (p.block_table) {
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                u32 index = static_cast<u32>(static_cast<u64>(row[slot]) * p.page_magic >> 32) >> p.page_shift;
                u32 found = static_cast<u32>(ldg(s.pages + index));
                found = found < static_cast<u32>(p.pages) ? found : 0;
                row[slot] += found * static_cast<u32>(p.page_rows) - index * static_cast<u32>(p.page_size);
            }
        }
    }
};

// One head's keys or values in global memory, from this thread's chunk on.
struct Source {
    const char* base;
    const char* tail;
    u32 row_bytes;

    VOLTA_DEVICE Source(const u16* data, const Strides3& strides, i32 batch, u32 head, u32 thread)
        : row_bytes(static_cast<u32>(2 * strides.row)) {
        const u16* first = data + batch * strides.batch + head * strides.head;
        base = pin(reinterpret_cast<const char*>(first + 8 * (thread & 7)));
        tail = reinterpret_cast<const char*>(first + 64 * GROUPS + 8 * (thread & 3));
        if (TAIL) tail = pin(tail);
    }

    VOLTA_DEVICE void load(Stage& stage, const CacheRows& rows) const {
#pragma unroll
        for (int slot = 0; slot < PASSES; ++slot) {
            const char* at = base + static_cast<u64>(rows.row[slot]) * row_bytes;
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) stage.chunk[slot * GROUPS + g] = ldg128_stream(at + 128 * g);
        }
        if (TAIL) {
            stage.chunk[PASSES * GROUPS] =
                ldg128_stream(tail + static_cast<u64>(rows.row[SLOTS - 1]) * row_bytes);
        }
    }
};

}  // namespace volta

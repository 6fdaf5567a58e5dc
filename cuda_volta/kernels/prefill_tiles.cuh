// Tiles of K and V: from global memory to registers while the tensor cores work, then to shared memory.
#pragma once

#include "attention.cuh"
#include "prefill_layout.cuh"

namespace volta {

// Eight lanes read 128 consecutive bytes of a row. Where a row ends with 64 bytes, four lanes read those of
// one row and four those of the row eight below, so that each eight lanes of a store meet every bank once.
static_assert(HEAD_DIM % 32 == 0, "a row is whole 64-byte pieces");
constexpr int GROUPS = HEAD_DIM / 64;
constexpr bool TAIL = HEAD_DIM % 64 != 0;
constexpr int PASSES = GROUPS ? 8 * BLOCK_K / THREADS : 0;
constexpr int PASS_ROWS = THREADS / 8;
constexpr int SLOTS = PASSES + TAIL;           // rows of a tile that one thread reads
constexpr int LOADS = PASSES * GROUPS + TAIL;  // 16-byte chunks of a tile that one thread reads

struct Stage {
    Word4 chunk[LOADS];
};

// Which rows and chunks of every tile a thread moves, and where they go.
struct Mover {
    u32 row, tail_row;  // within the tile
    u32 chunk, tail_chunk;
    u32 store_at, store_tail_at;
    bool has_tail;

    VOLTA_DEVICE explicit Mover(u32 thread)
        : row(thread >> 3),
          tail_row((thread >> 3 & 7) | (thread & 4) << 1 | (thread >> 2 & 16)),
          chunk(thread & 7),
          tail_chunk(8 * GROUPS + (thread & 3)),
          store_at(GROUPS ? pin(row * PITCH + 16 * (chunk ^ swizzle(row))) : 0),
          store_tail_at(TAIL ? pin(tail_row * PITCH + 16 * (tail_chunk ^ swizzle(tail_row))) : 0),
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
        if (has_tail) sts128(store_tail_at + tile, stage.chunk[LOADS - 1]);
    }
};

// Where this thread's keys of one tile are stored. Keys past the end repeat the last one, which exists. Rows
// of pages are counted from the start of the first page, which takes pages a whole number of rows apart, or
// of their own.
struct KeyRows {
    u32 twice[SLOTS];  // the row's number: times the stride in elements, its bytes
    u32 page[SLOTS];

    // Asks for the pages; rows are within them until `arrive`. Below the first key is its tile again, which
    // nobody uses.
    VOLTA_DEVICE void seek(const AttentionParams& p, const Sequence& s, const Mover& mover, u32 b, i32 key0) {
        const i32 last = s.k_begin + s.k_len - 1, first = s.k_begin + (key0 > 0 ? key0 : 0);
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            const i32 stored = first + mover.slot_row(slot);
            twice[slot] = 2 * static_cast<u32>(stored < last ? stored : last);
            page[slot] = 0;
        }
        if (!p.max_pages) return;
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            const u32 index =
                static_cast<u32>(static_cast<u64>(twice[slot]) * p.page_magic >> 32) >> p.page_shift;
            page[slot] = static_cast<u32>(ldg(p.block_table + b * static_cast<u32>(p.max_pages) + index));
            twice[slot] -= index * static_cast<u32>(2 * p.k_rows);
        }
    }

    VOLTA_DEVICE void arrive(const AttentionParams& p) {
        if (!p.max_pages) return;
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            page[slot] = page[slot] < static_cast<u32>(p.k_batches) ? page[slot] : 0;
            if (!ANYTHING) twice[slot] += page[slot] * static_cast<u32>(2 * p.page_rows);
        }
    }
};

// 16 bytes of a row that may be narrower than HEAD_DIM or not aligned; what is missing is zero.
VOLTA_DEVICE Word4 load_chunk(const u16* row, u32 chunk, i32 width, bool aligned) {
    const i32 first = static_cast<i32>(8 * chunk);
    if (aligned) return first < width ? ldg128_stream(row + first) : Word4{0, 0, 0, 0};
    u32 words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        const i32 at = first + 2 * w;
        words[w] = at < width ? ldg(row + at) : 0u;
        if (at + 1 < width) words[w] |= static_cast<u32>(ldg(row + at + 1)) << 16;
    }
    return {words[0], words[1], words[2], words[3]};
}

VOLTA_DEVICE bool is_aligned(const void* p, i64 batch, i64 row, i64 head, i32 width) {
    return ((reinterpret_cast<u64>(p) & 15) | ((batch | row | head | width) & 7)) == 0;
}

// One head's keys or values in global memory, from this thread's chunk on.
struct Source {
    const u16* base;
    const u16* tail;
    i64 row_stride, page_stride;
    i32 width;
    bool aligned;

    VOLTA_DEVICE Source(const u16* data, i64 batch, i64 row, i64 head, i32 columns, i32 cache_row,
                        u32 kv_head, const Mover& mover)
        : row_stride(row),
          page_stride(batch),
          width(columns),
          aligned(is_aligned(data, batch, row, head, columns)) {
        const u16* first = data + cache_row * batch + kv_head * head;
        base = ANYTHING ? first : pin(first + 8 * mover.chunk);
        tail = ANYTHING || !TAIL ? first : pin(first + 8 * mover.tail_chunk);
    }

    // Chunks past the row's width keep what the stage held. V's only reach columns of O that are not stored;
    // K's are zeros from the start, since no wider V shares the stage.
    VOLTA_DEVICE void load(Stage& stage, const KeyRows& rows, const Mover& mover) const {
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            const bool is_tail = slot >= PASSES;
            const u64 start = reinterpret_cast<u64>(is_tail ? tail : base);
            const u16* at = reinterpret_cast<const u16*>(
                multiply_add_wide(rows.twice[slot], static_cast<u32>(row_stride), start));
            if (ANYTHING) at = base + rows.twice[slot] / 2 * row_stride + rows.page[slot] * page_stride;
#pragma unroll
            for (int g = 0; g < (is_tail ? 1 : GROUPS); ++g) {
                const u32 chunk = is_tail ? mover.tail_chunk : 8 * static_cast<u32>(g) + mover.chunk;
                Word4& w = stage.chunk[is_tail ? LOADS - 1 : slot * GROUPS + g];
                if (ANYTHING)
                    w = load_chunk(at, chunk, width, aligned);
                else if (static_cast<i32>(8 * chunk) < width)
                    w = ldg128_stream(at + 64 * g);
            }
        }
    }
};

}  // namespace volta

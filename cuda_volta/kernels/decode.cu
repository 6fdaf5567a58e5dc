// Split-KV attention for few queries: every key and value is read once, straight into tensor-core operands.
//
// The query heads of a KV head times the queries are packed into 16 rows (two 8-row operands). A warp takes
// tiles of BLOCK_K keys on its own: no barrier, and no shared memory but Q's, until the 8 warps merge. A
// quadpair (lanes 4q..4q+3 and 16+4q..19+4q) owns
//   of K  the same 8 keys as the others and 8 of every 32 elements: 64 contiguous bytes of a key per load,
//         and the four partial scores are added across quadpairs, each of which keeps its part of the tile;
//   of V  16 of every 64 columns: 128 contiguous bytes of a row per load, and the output needs no addition.
// Both operands are 16 bytes a lane as they come from memory (PTX ISA, fragments of mma.m8n8k4): K is the
// column operand, two steps of 4 elements; V the row operand, two tiles of 8 columns, which are
// 8 (n / 4) + n % 4 and those plus 4.
#include "attention.cuh"
#include "decode_merge.cuh"
#include "decode_softmax.cuh"

namespace volta {

constexpr int GROUPS = BLOCK_K / 8;             // of keys, one 8x8 tile of scores each
constexpr int K_CHUNKS = HEAD_DIM / 32;         // elements of a key that one load covers
constexpr int V_CHUNKS = (HEAD_DIM + 63) / 64;  // columns of a value that one load covers
constexpr u32 CHUNK_BYTES = 512;
// The next tile's keys are on their way during the softmax, unless the output leaves no registers for them.
constexpr bool EARLY_KEYS = HEAD_DIM < 256;

// 8 elements at p, of which `present` exist.
VOLTA_DEVICE Word4 load8(const u16* p, i32 present) {
    Word4 v{0, 0, 0, 0};
#if VECTOR
    if (present > 0) v = ldg128_stream(p);
#else
#pragma unroll 4
    for (int i = 0; i < 8; ++i) {
        const u32 h = i < present ? ldg(p + i) : 0;
        v = {v.x >> 16 | v.y << 16, v.y >> 16 | v.z << 16, v.z >> 16 | v.w << 16, v.w >> 16 | h << 16};
    }
#endif
    return v;
}

// Q as row operands in shared memory, in the order in which lanes read them: free of conflicts.
VOLTA_DEVICE void store_queries(const AttentionParams& p, const Block& k, u32 base) {
    const u32 lane = lane_index();
    for (u32 piece = warp_index(); piece < 2 * K_CHUNKS; piece += MERGE_WARPS) {
        const i32 row = static_cast<i32>(piece / K_CHUNKS * 8 + operand_row(lane));
        const i32 d = static_cast<i32>(piece % K_CHUNKS * 32 + quadpair(lane) * 8);
        const PackedRow at = packed_row(k, row);
        const u16* q = p.q + k.batch * p.q_batch + (k.seq.q_begin + at.query) * p.q_row + at.head * p.q_head;
        sts128(base + piece * CHUNK_BYTES + lane * 16, load8(q + d, row < k.rows ? p.head_dim - d : 0));
    }
}

// Where a tile's keys and values begin, from those of the KV head: each lane knows one key's, and asks
// another lane for those of the key that it loads. Aligned rows are counted in 16 bytes: 32 bits reach 64 GB.
#if VECTOR
using Offset = u32;
constexpr i64 OFFSET_UNIT = 8;
VOLTA_DEVICE Offset offset_of(Offset offset, u32 key) { return shuffle(offset, key); }
#else
using Offset = u64;
constexpr i64 OFFSET_UNIT = 1;
VOLTA_DEVICE Offset offset_of(Offset offset, u32 key) {
    const u64 high = shuffle(static_cast<u32>(offset >> 32), key);
    return high << 32 | shuffle(static_cast<u32>(offset), key);
}
#endif
struct Offsets {
    Offset k, v;
};
VOLTA_DEVICE Offsets find_offsets(const AttentionParams& p, const Block& k, i32 tile, i32 end) {
    const i32 j = tile + static_cast<i32>(lane_index() % BLOCK_K);
    const KeyPlace at = key_place(p, k.seq, k.batch, j < end ? j : end - 1);
    return {static_cast<Offset>((at.batch * p.k_batch + at.row * p.k_row) / OFFSET_UNIT),
            static_cast<Offset>((at.batch * p.v_batch + at.row * p.v_row) / OFFSET_UNIT)};
}

struct KeyTile {
    Word4 w[GROUPS][K_CHUNKS];
};
VOLTA_DEVICE void load_keys(KeyTile& keys, const AttentionParams& p, const u16* head, Offset known, i32 tile,
                            i32 end) {
    const u32 lane = lane_index();
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        const u32 key = g * 8 + operand_row(lane);
        const u16* row = head + offset_of(known, key) * OFFSET_UNIT;
        const bool exists = tile + static_cast<i32>(key) < end;
#pragma unroll
        for (int c = 0; c < K_CHUNKS; ++c) {
            const i32 d = c * 32 + static_cast<i32>(quadpair(lane)) * 8;
            keys.w[g][c] = load8(row + d, exists ? p.head_dim - d : 0);
        }
    }
}

struct ValueTile {
    Word4 w[GROUPS][2][V_CHUNKS];  // 4 keys each
};
VOLTA_DEVICE void load_values(ValueTile& values, const AttentionParams& p, const u16* head, Offset known,
                              i32 tile, i32 end) {
    const u32 lane = lane_index();
    const i32 first = static_cast<i32>(quadpair(lane) * 16 + (lane >> 4) * 8);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const u32 key = g * 8 + j * 4 + lane % 4;
            const u16* row = head + offset_of(known, key) * OFFSET_UNIT;
            const bool exists = tile + static_cast<i32>(key) < end;
#pragma unroll
            for (int c = 0; c < V_CHUNKS; ++c) {
                const i32 d = c * 64 + first;
                values.w[g][j][c] = load8(row + d, exists ? p.v_head_dim - d : 0);
            }
        }
    }
}

}  // namespace volta

using namespace volta;

// Grid: (batch * kv_heads * row tiles, splits).
VOLTA_KERNEL(decode, 256, 1)(AttentionParams p) {
    const u32 lane = lane_index();
    Block k;
    k.group = p.heads / p.kv_heads;
    const i32 row_tiles = (p.max_seqlen_q * k.group + 15) / 16;
    const i32 unit = static_cast<i32>(block_x()) / row_tiles;
    k.kv_head = unit % p.kv_heads;
    k.batch = unit / p.kv_heads;
    k.seq = find_sequence(p, k.batch);
    k.first_row = static_cast<i32>(block_x()) % row_tiles * 16;
    k.rows = clamp(k.seq.q_len * k.group - k.first_row, 0, 16);
    if (k.rows == 0) return;
    const bool second = k.rows > 8;

    const u32 queries = shared_base();
    const u32 bands = queries + 2 * K_CHUNKS * CHUNK_BYTES;
    const u32 merging = bands + 16 * 8;
    // This split's tiles of the keys that any row sees.
    const Band upper = visible_band(p, k.seq, packed_row(k, 0).query);
    const Band lower = visible_band(p, k.seq, packed_row(k, k.rows - 1).query);
    const i32 begin = upper.first;
    const i32 beyond = lower.last + 1;
    const i32 tiles = beyond > begin ? (beyond - begin + BLOCK_K - 1) / BLOCK_K : 0;
    const i32 share = (tiles + p.splits - 1) / p.splits;
    const i32 first = static_cast<i32>(block_y()) * share;
    const i32 stop = clamp(first + share, 0, tiles);
    const i32 end = stop < tiles ? begin + stop * BLOCK_K : beyond;
    const Band common{lower.first, upper.last < end - 1 ? upper.last : end - 1};  // what every row sees

    store_queries(p, k, queries);
    if (thread_index() < 16) store_band(p, k, bands, static_cast<i32>(thread_index()), end - 1);
    barrier();
    const ScoreScale scale = score_scale(p, k.kv_head);
    const bool biased = p.alibi_slopes || p.mask_kind != MASK_NONE;
    const u32 biases = merging + warp_index() * 16 * BIAS_PITCH<BLOCK_K> * 4;  // until warps merge

    LaneRow rows[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m) rows[m][0] = rows[m][1] = {-infinity(), 0.0f};
    float o[2][V_CHUNKS][2][8] = {};
    const u16* const k_head = p.k + k.kv_head * p.k_head;
    const u16* const v_head = p.v + k.kv_head * p.v_head;
    KeyTile keys;
    ValueTile values;
    if (first < stop) {
        const i32 tile = begin + (first + static_cast<i32>(warp_index())) * BLOCK_K;
        const Offsets known = find_offsets(p, k, tile, end);
        load_keys(keys, p, k_head, known.k, tile, end);
        load_values(values, p, v_head, known.v, tile, end);
    }
    // All warps go round together, so that the compiler sees whole warps; one whose tile lies behind the end
    // has loaded nothing, and its rows see none of it.
#pragma unroll 1
    for (i32 round = first; round < stop; round += MERGE_WARPS) {
        const i32 round_key = begin + round * BLOCK_K;
        const bool masked = round_key < common.first || round_key + BLOCK_K * 8 - 1 > common.last;
        const i32 tile = round_key + static_cast<i32>(warp_index()) * BLOCK_K;
        const i32 next = tile + MERGE_WARPS * BLOCK_K;
        Offsets known;
        if (EARLY_KEYS) known = find_offsets(p, k, next, end);

        float s[2][GROUPS][8] = {};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            if (m == 1 && !second) continue;
#pragma unroll
            for (int c = 0; c < K_CHUNKS; ++c) {
                const Word4 q = lds128(queries + (m * K_CHUNKS + c) * CHUNK_BYTES + lane * 16);
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
                    mma_rc(s[m][g], {q.x, q.y}, {keys.w[g][c].x, keys.w[g][c].y});
                    mma_rc(s[m][g], {q.z, q.w}, {keys.w[g][c].z, keys.w[g][c].w});
                }
            }
        }
        if (biased) store_biases<BLOCK_K>(p, k, biases, tile);
        if (EARLY_KEYS) load_keys(keys, p, k_head, known.k, next, end);

#pragma unroll
        for (int m = 0; m < 2; ++m) {
            if (m == 1 && !second) continue;
            float rescale[2];
            float own[8];
            own_scores(own, s[m], scale);
            if (biased) add_biases<GROUPS>(own, biases, m);
            if (masked) hide_keys<GROUPS>(own, bands, m, tile);
            online_softmax<GROUPS>(own, rows[m], rescale);
            if (any_lane(rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
                for (int c = 0; c < V_CHUNKS; ++c) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        o[m][c][0][i] *= rescale[i >> 1 & 1];
                        o[m][c][1][i] *= rescale[i >> 1 & 1];
                    }
                }
            }
            Word2 kept[2];
            row_operands(kept, own);
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const Word2 a = operand_of<GROUPS>(kept[j], g);
#pragma unroll
                    for (int c = 0; c < V_CHUNKS; ++c) {
                        const Word4 v = values.w[g][j][c];
                        mma_rr(o[m][c][0], a, {v.x, v.y});
                        mma_rr(o[m][c][1], a, {v.z, v.w});
                    }
                }
            }
        }
        if (!EARLY_KEYS) {
            known = find_offsets(p, k, next, end);
            load_keys(keys, p, k_head, known.k, next, end);
        }
        load_values(values, p, v_head, known.v, next, end);
    }

    barrier();
    // Lanes whose row exists nowhere else (l ^ 2 shares it, as do all quadpairs) publish it.
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float sum = whole_row_sum<GROUPS>(rows[m][r].sum);
            const u32 row = warp_index() * 16 + m * 8 + accumulator_row(lane, r);
            if ((lane & 14) == 0) sts64(merging + row * 8, {float_bits(rows[m][r].max), float_bits(sum)});
        }
    }
    barrier();

    const i32 row = static_cast<i32>(thread_index() / 16);
    const i32 column = static_cast<i32>(thread_index() % 16) * 4;
    const bool mine = row < k.rows;
    const PackedRow at = packed_row(k, mine ? row : 0);
    const float lse = row_lse(merge_stats(merging, row));
    if (p.splits > 1) {
        const i64 place = packed_place(p, k.seq, k.batch, at) * p.splits + block_y();
        if (mine && column == 0) stg(p.partial_lse + place, lse);
        float* const out = p.partial_out + place * p.partial_width;
        merge_outputs(o, rows, merging, second, mine, [&](int c, const float (&x)[4]) {
            const Word4 bits{float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])};
            if (c * 64 + column < p.v_head_dim) stg(reinterpret_cast<Word4*>(out + c * 64 + column), bits);
        });
    } else {
        const Sunk sunk = add_sink(p, at.head, lse);
        const float factor = p.v_scale ? sunk.factor * ldg(p.v_scale + k.kv_head) : sunk.factor;
        u16* const out = out_row(p, k.seq, k.batch, at);
        if (mine && column == 0) write_lse(p, k.seq, k.batch, at, sunk.lse);
        merge_outputs(o, rows, merging, second, mine, [&](int c, float (&x)[4]) {
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i] *= factor;
            write_halves(p, out, c * 64 + column, x);
        });
    }
}

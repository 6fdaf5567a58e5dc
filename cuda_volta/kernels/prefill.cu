#include "prefill_products.cuh"
#include "prefill_tiles.cuh"
#include "prefill_mask.cuh"
#include "prefill_epilogue.cuh"

namespace volta {

#ifndef QK_UNROLL
#define QK_UNROLL 8
#endif
#ifndef PV_UNROLL
#define PV_UNROLL 2
#endif
struct Block {
    const PrefillParams& p;
    const Sequence& sequence;
    Lane lane;
        u32 k_tile, v_tile, q_base, k_base, v_base[2][2];
    float scale;
    Mover mover;
    Source k_source, v_source;
    Softmax softmax;
    Output out;
    Word4 q[Q_IN_REGISTERS ? STEPS : 1][2];
    CacheRows rows;

    // The tile's first key, and that of the tile after the next.
    VOLTA_DEVICE void scores(Scores& s) {
        float sum[2][SCORE_COLS][8];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < SCORE_COLS; ++n)
#pragma unroll
                for (int i = 0; i < 8; ++i) sum[m][n][i] = 0.0f;
        if (Q_IN_REGISTERS) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                Word4 k[SCORE_COLS];
                load_key_step(k, key_step(k_base, step));
                multiply_step(sum, q[step], k);
            }
        } else {
            u32 qa = q_base, ka = k_base;
#pragma unroll 1
            for (int g = 0; g < STEPS / QK_UNROLL; ++g) {
#pragma unroll
                for (int u = 0; u < QK_UNROLL; ++u) {
                    Word4 k[SCORE_COLS], a[2] = {lds128(qa + 512 * u), lds128(qa + 512 * u + 64)};
                    load_key_step(k, key_step(ka, u));
                    multiply_step(sum, a, k);
                }
                qa += 512 * QK_UNROLL;
                ka += QK_UNROLL * (WIDE ? 32 : 16);
            }
        }
#pragma unroll
        for (int n = 0; n < SCORE_COLS; ++n)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (WIDE) {
                    s[0][n][i] = sum[0][n][i] + shuffle_xor(sum[1][n][i], 8);
                } else {
#pragma unroll
                    for (int m = 0; m < SCORE_ROWS; ++m) s[m][n][i] = sum[m][n][i];
                }
            }
    }

    template <bool EDGE>
    VOLTA_DEVICE void values(const Scores& s) {
        Operand8 own[SCORE_COLS][2];
#pragma unroll
        for (int t = 0; t < SCORE_COLS; ++t)
#pragma unroll
            for (int m = 0; m < SCORE_ROWS; ++m) own[t][m] = probabilities_to_operand(s[m][t], lane.odd);
        Operand8 now[2] = {own[0][0], own[0][1]};
        u32 va[2][2] = {{v_base[0][0], v_base[0][1]}, {v_base[1][0], v_base[1][1]}};
#pragma unroll(EDGE ? 1 : PV_UNROLL)
        for (int t = 0; t < SCORE_COLS; ++t) {
            if (WIDE) now[1] = from_lane(now[0], 8);
#pragma unroll
            for (int crossed = 0; crossed < 2; ++crossed) {
                Operand8 a[2];
#pragma unroll
                for (int m = 0; m < 2; ++m) a[m] = crossed ? from_lane(now[m], 4) : now[m];
#pragma unroll
                for (int kk = 0; kk < 2; ++kk) {
#pragma unroll
                    for (int j = 0; j < OUT_COLS / 2; ++j) {
                        u32 at = WIDE ? va[crossed][0] + 128 * j : va[crossed][j & 1] + 128 * (j >> 1);
                        Word4 v = lds128(at + 4 * kk * PITCH);
#pragma unroll
                        for (int m = 0; m < 2; ++m) mma_rr(out[m][2 * j], a[m].k[kk], low_k(v));
#pragma unroll
                        for (int m = 0; m < 2; ++m) mma_rr(out[m][2 * j + 1], a[m].k[kk], high_k(v));
                    }
                }
            }
            now[0] = own[SCORE_COLS - 1][0];
            now[1] = own[SCORE_COLS - 1][1];
            for (int i = 0; i < 4; ++i) va[i >> 1][i & 1] += 16 * PITCH;
        }
    }

    template <bool EDGE>
    VOLTA_DEVICE void tile(i32 key0, i32 next2) {
        Stage stage;
        k_source.load(stage, rows);
        Scores s;
        scores(s);
        barrier();
        mover.store(k_tile, stage);
        v_source.load(stage, rows);
        rows.locate(p, sequence, mover, next2);
        if (EDGE) mask(s, p, sequence, lane, key0);
        update(softmax, out, s, scale);
        values<EDGE>(s);
        barrier();
        mover.store(v_tile, stage);
    }
};

}  // namespace volta

VOLTA_KERNEL(prefill, volta::THREADS, volta::MIN_BLOCKS)(volta::PrefillParams p) {
    using namespace volta;
    Sequence sequence(p, block_z());
    i32 query0 = block_x() * BLOCK_Q;
    if (query0 >= sequence.q_len) return;
    u32 head = block_y();
    TileRange range(p, sequence, query0);
    u32 thread = thread_index();
    u32 kv_head = head / p.heads_per_kv;
    Lane lane(lane_index());
    Block b{p, sequence, lane, shared_base(), shared_base() + KV_BYTES, 0, 0, {}, 0, Mover(thread),
      Source(p.k, p.k_strides, sequence.k_batch, kv_head, thread), Source(p.v, p.v_strides, sequence.k_batch, kv_head, thread)};
    b.k_base = pin(b.k_tile + key_offset(lane));
    for (u32 c = 0; c < 2; ++c) for (u32 j = 0; j < 2; ++j) b.v_base[c][j] = pin(b.v_tile + value_offset(lane, c, j));
    b.scale = p.scale * LOG2_E;
    b.q_base = pin(b.v_tile + KV_BYTES + warp_index() * Q_WARP_BYTES + (2 * lane.other + lane.high) * 128 + 16 * lane.low);
    {
        i32 query = query0;
        for (int step = 0; step < STEPS; ++step) {
            u32 chunk = WIDE ? 2 * step + lane.other : step;
            Word4 w[2];
            for (int m = 0; m < 2; ++m) {
            i32 row = clamp(query0 + warp_index() * WARP_ROWS + tile_row(lane, m) + 4 * lane.high + lane.low, 0, sequence.q_len - 1);
            w[m] = ldg128_stream(p.q + (u64)block_z() * p.q_strides.batch + (u64)(row + sequence.q_row) * p.q_strides.row + head * p.q_strides.head + 8 * chunk);
            }
            if (Q_IN_REGISTERS) { b.q[step][0] = w[0]; b.q[step][1] = w[1]; }
            else { sts128(b.q_base + 512 * step, w[0]); sts128(b.q_base + 512*step+64, w[1]); }
        }
    }
    b.softmax.start();
    for (int m = 0; m < 2; ++m) for (int n = 0; n < OUT_COLS; ++n) for (int i = 0; i < 8; ++i) b.out[m][n][i] = 0;
    if (range.count > 0) {
        Stage stage;
        b.rows.locate(p, sequence, b.mover, range.key(0));
        b.k_source.load(stage, b.rows);
        b.mover.store(b.k_tile, stage);
        b.v_source.load(stage, b.rows);
        b.mover.store(b.v_tile, stage);
        b.rows.locate(p, sequence, b.mover, range.key(1));
        barrier();
        i32 i = 0;
#pragma unroll 1
        for (; i < range.edges; ++i) b.tile<true>(range.key(i), range.key(i + 2));
        i32 next2 = range.key(i + 2);
#pragma unroll 1
        for (; i < range.count; ++i, next2 += BLOCK_K) b.tile<false>(0, next2);
    }
    finish(b.softmax, b.out, p, sequence, lane, query0 + warp_index() * WARP_ROWS, head, block_z());
}

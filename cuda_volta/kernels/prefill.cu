// FlashAttention's forward pass for many queries. A block takes BLOCK_Q queries of one head; K and V pass
// through shared memory in tiles of BLOCK_K keys, from the last to the first; scores, probabilities and O never
// leave registers.
#include "prefill_epilogue.cuh"
#include "prefill_queries.cuh"
#include "prefill_range.cuh"

namespace volta {

struct Prefill {
    const AttentionParams& p;
    const Sequence& sequence;
    const Lane& lane;
    const u32 batch, head;
    const i32 query0;         // the warp's first
    const float logit_scale;  // of q k^T, in base 2, positive
    const u32 k_tile, v_tile, key_base;
    const ScoreRules rules;
    const Visibility visibility;
    const ValueOffsets values;
    const Mover mover;
    const Source k_source, v_source;
    KeyRows rows;  // of the tile after the current one
    Stage stage;   // its keys, then its values
    Queries q;
    Softmax softmax;
    Output out;

    VOLTA_DEVICE Prefill(const AttentionParams& params, const Sequence& s, const Lane& l, u32 b, u32 h,
                         u32 kv_head, i32 row0, float scale, u32 shared)
        : p(params),
          sequence(s),
          lane(l),
          batch(b),
          head(h),
          query0(row0),
          logit_scale(fmaxf(fabsf(scale), 1e-30f)),
          k_tile(shared),
          v_tile(shared + KV_BYTES),
          key_base(pin(shared + key_offset(l))),
          rules(params, logit_scale, b, h),
          visibility(params, s, row0),
          values(l),
          mover(thread_index()),
          k_source(p.k, p.k_batch, p.k_row, p.k_head, p.head_dim, cache_row(), kv_head, mover),
          v_source(p.v, p.v_batch, p.v_row, p.v_head, p.v_head_dim, cache_row(), kv_head, mover) {
        q.at = SHARED_STEPS == 0
                   ? 0
                   : pin(shared + 2 * KV_BYTES + warp_index() * Q_WARP_BYTES + query_offset(lane));
#pragma unroll
        for (int i = 0; i < LOADS; ++i) stage.chunk[i] = {0, 0, 0, 0};
#pragma unroll
        for (int r = 0; r < ROWS; ++r) softmax.reference[r] = UNSEEN, softmax.sum[r] = 0.0f;
#pragma unroll
        for (int e = 0; e < 16 * OUT_COLS; ++e) out[e / 8 / OUT_COLS][e / 8 % OUT_COLS][e % 8] = 0.0f;
    }

    VOLTA_DEVICE i32 cache_row() const {
        return p.block_table || p.cu_seqlens_k ? 0 : sequence.k_batch;
    }

    // Everything is requested before anything is waited for.
    VOLTA_DEVICE void start(i32 key0, bool negate) {
        rows.seek(p, sequence, mover, batch, key0);
        rows.arrive(p);
        Stage first_values = stage;
        k_source.load(stage, rows, mover);
        v_source.load(first_values, rows, mover);
        load_queries(q, p, sequence, lane, batch, head, query0, negate);
        mover.store(k_tile, stage);
        rows.seek(p, sequence, mover, batch, key0 - BLOCK_K);
        rows.arrive(p);
        k_source.load(stage, rows, mover);
        mover.store(v_tile, first_values);
        barrier();
    }

    // One tile of keys, in shared memory already. The next one's keys arrive while S is computed and replace
    // this one's behind the first barrier; its values arrive while O is computed and follow behind the
    // second. A warp whose rows see nothing of the tile only moves data.
    VOLTA_DEVICE void tile(i32 key0) {
        const bool whole = !ANYTHING && visibility.whole(key0);
        const bool nothing = !whole && visibility.nothing(key0);
        Products sum;
        // Unset on one path, the assembler would keep its registers for it throughout the loop.
        if (nothing) clear(sum);
        else multiply_keys(sum, q, key_base);
        barrier();
        mover.store(k_tile, stage);
        v_source.load(stage, rows, mover);
        rows.seek(p, sequence, mover, batch, key0 - 2 * BLOCK_K);
        if (!nothing) {
            Scores s;
            collect(s, sum);
            if (FEATURES) rules.apply(s, p, sequence, lane, logit_scale, batch, head, query0, key0);
            if (unlikely(!whole)) apply_band(s, p, sequence, lane, query0, key0);
            update(softmax, out, s, rules.scale);
            multiply_values(out, s, v_tile, values, lane.odd);
        }
        barrier();
        mover.store(v_tile, stage);
        rows.arrive(p);
        k_source.load(stage, rows, mover);
    }
};

}  // namespace volta

VOLTA_KERNEL(prefill, volta::THREADS, BLOCKS)(volta::AttentionParams p) {
    using namespace volta;
    // Later queries see more keys under a causal bound: their blocks start first.
    const i32 block0 = static_cast<i32>(grid_x() - 1 - block_x()) * BLOCK_Q;
    const u32 batch = static_cast<u32>(p.first_batch) + block_z(), head = block_y();
    const Sequence sequence = find_sequence(p, batch);
    if (block0 >= sequence.q_len) return;
    const TileRange range(p, sequence, block0);
    const Lane lane(lane_index());
    const u32 kv_head = head / static_cast<u32>(p.heads / p.kv_heads);
    const float k_scale = p.k_scale ? ldg(p.k_scale + kv_head) : 1.0f;
    const float scale = p.scale * k_scale * LOG2_E;
    const i32 query0 = block0 + static_cast<i32>(uniform(warp_index())) * WARP_ROWS;
    Prefill block(p, sequence, lane, batch, head, kv_head, query0, scale, shared_base());
    if (range.last >= range.first) {
        block.start(range.last, scale < 0.0f);
#pragma unroll 1
        for (i32 key0 = range.last; key0 >= range.first; key0 -= BLOCK_K) block.tile(key0);
    }
    finish(block.softmax, block.rules, block.out, p, lane, batch, head, query0);
}

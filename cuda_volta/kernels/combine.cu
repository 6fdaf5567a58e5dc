// Merges the splits' partial softmaxes of decode.cu by their log-sum-exp, in the order of the splits; a
// head's sink enters here, once.
#include "decode_output.cuh"

using namespace volta;

// Grid: (batch * heads * queries / 8); a warp has one row, a lane 4 of every 128 columns.
VOLTA_KERNEL(combine, 256, 4)(AttentionParams p) {
    const u32 lane = lane_index();
    const i32 unit = static_cast<i32>(block_x() * 8 + warp_index());
    const i32 head = unit % p.heads;
    const i32 query = unit / p.heads % p.max_seqlen_q;
    const i32 b = unit / p.heads / p.max_seqlen_q;
    if (b >= p.batch) return;
    const Sequence s = find_sequence(p, b);
    if (query >= s.q_len) return;
    const PackedRow at{query, head};

    const i64 place = packed_place(p, s, b, at) * p.splits;
    float top = -infinity();
    for (i32 i = static_cast<i32>(lane); i < p.splits; i += 32) {
        const float lse = ldg(p.partial_lse + place + i);
        top = lse > top ? lse : top;
    }
#pragma unroll
    for (u32 mask = 16; mask; mask >>= 1) {
        const float other = shuffle_xor(top, mask);
        top = other > top ? other : top;
    }
    const float base = top == -infinity() ? 0.0f : top;

    float sum = 0.0f;
    float out[2][4] = {};
    for (i32 first = 0; first < p.splits; first += 32) {
        const i32 mine = first + static_cast<i32>(lane);
        const float weight = mine < p.splits ? exp2_approx(ldg(p.partial_lse + place + mine) - base) : 0.0f;
        for (i32 i = first; i < p.splits && i < first + 32; ++i) {
            const float w = shuffle(weight, static_cast<u32>(i - first));
            sum += w;
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const i32 column = c * 128 + static_cast<i32>(lane) * 4;
                if (w == 0.0f || column >= p.v_head_dim) continue;
                const float* const row = p.partial_out + (place + i) * p.partial_width;
                const Word4 x = ldg(reinterpret_cast<const Word4*>(row + column));
                out[c][0] += w * bits_float(x.x);
                out[c][1] += w * bits_float(x.y);
                out[c][2] += w * bits_float(x.z);
                out[c][3] += w * bits_float(x.w);
            }
        }
    }

    const RowTotal total{top, sum};
    const Sunk sunk = add_sink(p, head, row_lse(total));
    float factor = saw_nothing(total) ? 0.0f : sunk.factor * rcp_approx(sum);
    if (p.v_scale) factor *= ldg(p.v_scale + head / (p.heads / p.kv_heads));
    if (lane == 0) write_lse(p, s, b, at, sunk.lse);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[c][i] *= factor;
        write_halves(p, out_row(p, s, b, at), c * 128 + static_cast<i32>(lane) * 4, out[c]);
    }
}
